"""The estimated cost of K-FAC, from timings with known values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm.system.device_timer import DeviceTimer
from llm.training.profiling.kfac_timing import cost_lines, newest_seconds
from llm.training.updaters.preconditioning import NoPreconditioner, StepTiming, UpdateIntervals

TIMER = DeviceTimer(torch.device("cpu"))


class TimedPreconditioner(NoPreconditioner):
    """A preconditioner whose steps took 3 ms after a gap of 100 ms, or of 130 ms in updates with a factor update."""

    def __init__(self, num_steps: int, *, factors: int, period: int) -> None:
        self.intervals = UpdateIntervals(factors, period)
        timings = []
        now = 0.0
        for step in range(num_steps):
            begin = now + (0.13 if step % factors == 0 else 0.1)
            now = begin + 0.003
            timings.append(StepTiming(step, begin, now))
        self.timings = timings


def test_newest_seconds_when_steps_are_timed_then_the_newest_are_summed() -> None:
    preconditioner = TimedPreconditioner(10, factors=2, period=2)
    assert newest_seconds(preconditioner, TIMER, 4) == pytest.approx(0.012)
    assert newest_seconds(preconditioner, TIMER, 100) == pytest.approx(0.03)


def test_newest_seconds_when_steps_are_not_timed_then_is_none() -> None:
    assert newest_seconds(NoPreconditioner(), TIMER, 4) is None


def test_cost_lines_when_factor_updates_alternate_then_half_of_the_difference_is_added() -> None:
    # 3 ms of the step, and 30 ms in every second update; an update without K-FAC takes 100 ms.
    (line,) = cost_lines(TimedPreconditioner(11, factors=2, period=2), TIMER)
    assert line == "K-FAC took 18.0 ms an update, 18% of an update without it (measured over 10 updates)"


def test_cost_lines_when_every_update_updates_factors_then_the_rest_is_given_instead() -> None:
    (line,) = cost_lines(TimedPreconditioner(10, factors=1, period=1), TIMER)
    assert line.startswith("K-FAC took 3.0 ms an update, and its factor update in every backward pass")
    assert line.endswith("130.0 ms (measured over 10 updates)")


@pytest.mark.parametrize(("num_steps", "period"), [(0, 1), (2, 1), (19, 10)])
def test_cost_lines_when_the_run_is_short_then_there_are_none(num_steps: int, period: int) -> None:
    assert cost_lines(TimedPreconditioner(num_steps, factors=1, period=period), TIMER) == []


def test_cost_lines_when_steps_are_not_timed_then_there_are_none() -> None:
    unused: Any = None
    assert cost_lines(NoPreconditioner(), unused) == []
