"""What K-FAC takes of a run's time, by marks that the run does not wait for."""

from __future__ import annotations

import statistics
from collections import deque
from itertools import pairwise
from typing import NamedTuple

from llm.system.device_timer import DeviceTimer, Mark

_NUM_UPDATES = 200


class UpdateIntervals(NamedTuple):
    """When a preconditioner does what.

    Attributes:
        looks: updates from one look at the curvature, in the backward passes, to the next.
        period: updates after which all its work begins anew.
    """

    looks: int
    period: int


class _Step(NamedTuple):
    has_looked: bool
    begin: Mark
    end: Mark


class Cost:
    """Measured over the newest updates.

    A look at the curvature hides in the backward passes: it is what the updates with one take longer, from the end of
    the last step of K-FAC to the beginning of this one, than those without.

    Args:
        clock: of the device.
        rhythm: of the preconditioner.
    """

    def __init__(self, clock: DeviceTimer, rhythm: UpdateIntervals) -> None:
        self._clock, self._rhythm = clock, rhythm
        self._steps: deque[_Step] = deque(maxlen=max(_NUM_UPDATES, 2 * rhythm.period) // rhythm.period * rhythm.period)

    def note(self, step: int, begin: Mark, end: Mark) -> None:
        """One step of K-FAC, that of update `step`; the first period, when it has more to do, does not count."""
        if step >= self._rhythm.period:
            self._steps.append(_Step(step % self._rhythm.looks == 0, begin, end))

    def newest_seconds(self, num_updates: int) -> float:
        """Of the newest steps, all together; without what looking took in their backward passes."""
        self._clock.wait()
        steps = list(self._steps)[-num_updates:]
        return sum(self._clock.seconds(each.begin, each.end) for each in steps)

    def line(self) -> str | None:
        """Such as `K-FAC took 3.2 ms an update, 41% of an update without it (the last 200)`; None of a short run."""
        steps, period = list(self._steps), self._rhythm.period
        steps = steps[len(steps) % period :]
        if len(steps) < 2 * period or len(steps) < 3:
            return None
        self._clock.wait()
        own = statistics.fmean(self._clock.seconds(each.begin, each.end) for each in steps)
        gaps: dict[bool, list[float]] = {True: [], False: []}
        for before, each in pairwise(steps):
            gaps[each.has_looked].append(self._clock.seconds(before.end, each.begin))
        if not gaps[False]:
            without = statistics.median(gaps[True])
            return (
                f"K-FAC took {own * 1e3:.1f} ms an update, and its look at the curvature in every backward pass, which "
                f"python -m llm.bench tells apart; all else {without * 1e3:.1f} ms (measured over {len(steps)} updates)"
            )
        without = statistics.median(gaps[False])
        own += max(0.0, statistics.median(gaps[True]) - without) / self._rhythm.looks
        return (
            f"K-FAC took {own * 1e3:.1f} ms an update, {own / without:.0%} of an update without it "
            f"(measured over {len(steps)} updates)"
        )
