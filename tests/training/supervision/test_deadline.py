"""The times at which a run must stop without a signal."""

from __future__ import annotations

import time

import pytest
import torch

from llm.config.options import TrainingOptions
from llm.distributed.world import World
from llm.training.supervision.deadline import Deadline, find_deadline


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_deadline_when_no_time_is_set_then_there_is_no_reason_to_stop() -> None:
    deadline = Deadline()
    assert deadline.reason() is None
    assert deadline.lines() == []


def test_deadline_when_max_time_is_over_then_it_is_the_reason_to_the_second() -> None:
    clock = Clock()
    deadline = Deadline(max_time=1060, clock=clock)
    clock.now = 1059.9
    assert deadline.reason() is None
    clock.now = 1060
    assert deadline.reason() == "max_time"
    assert "--max_time" in deadline.lines()[0]


def test_walltime_when_saves_are_short_then_the_margin_is_two_minutes() -> None:
    clock = Clock()
    deadline = Deadline(walltime=4600, clock=clock)
    assert deadline.margin_seconds == 120
    clock.now = 4479
    assert deadline.reason() is None
    clock.now = 4480
    assert deadline.reason() == "walltime"


def test_walltime_when_saves_are_long_then_the_margin_grows_with_the_longest() -> None:
    deadline = Deadline(walltime=4600, clock=Clock())
    for seconds in (100, 70):
        deadline.record_save(seconds)
    assert deadline.margin_seconds == 300


def test_walltime_when_the_job_is_short_then_half_of_it_is_used() -> None:
    clock = Clock()
    deadline = Deadline(walltime=1100, clock=clock)
    assert deadline.margin_seconds == 50
    assert deadline.reason() is None
    clock.now = 1050
    assert deadline.reason() == "walltime"


def test_find_deadline_when_the_option_and_the_job_set_times_then_both_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    now = time.time()
    monkeypatch.setenv("LLM_END_TIME", str(now + 3600))
    lines = find_deadline(TrainingOptions(max_time="1h"), alone, started=now).lines()
    assert len(lines) == 2
    assert find_deadline(TrainingOptions(max_time="1h"), alone, started=now - 3601).reason() == "max_time"
