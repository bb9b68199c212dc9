"""Arguments that may change from step to step, and the steps at which factors and inverses are updated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

ValueOrSchedule = float | Callable[[int], float]
"""A number, or a function `step -> number`; steps count from 0."""


def value_at(value: ValueOrSchedule, step: int) -> float:
    """Return the value at a step."""
    return value(step) if callable(value) else value


def steady_value(value: ValueOrSchedule, step: int) -> float:
    """Return the value at a step; for `dense_early` the interval that holds after the early steps."""
    return value.interval if isinstance(value, DenseEarly) else value_at(value, step)


def is_due(interval: ValueOrSchedule, step: int) -> bool:
    """Return whether the step is a multiple of the interval, in steps; step 0 always is."""
    return step % max(1, int(value_at(interval, step))) == 0


def is_refresh_due(interval: ValueOrSchedule, step: int, offset: float = 0.0) -> bool:
    """Return whether inverses are refreshed: at multiples of the interval, and at 1, 2, 4, 8, … below it.

    The early refreshes are there because the curvature of the first steps is soon out of date.

    Args:
        interval: in steps.
        step: number of the step, from 0.
        offset: share of the interval, 0 <= offset < 1, by which refreshes follow its multiples, from the first multiple
            above 0 on. Step 0 and the early refreshes are not shifted.
    """
    length = max(1, int(value_at(interval, step)))
    if step < length:
        return step & (step - 1) == 0
    return step % length == int(offset * length)


@dataclass(frozen=True)
class DenseEarly:
    """The schedule that `dense_early` returns.

    Attributes:
        interval: in steps, after the early steps.
    """

    interval: int

    def __call__(self, step: int) -> int:
        """Return 1 at an early step that is due, else the interval."""
        return 1 if 0 < step < self.interval and step & (step - 1) == 0 else self.interval


def dense_early(interval: int) -> DenseEarly:
    """Return an interval in steps that has additional updates at the steps 1, 2, 4, 8, … below it.

    It is meant for `factor_update_steps`: the early refreshes of an inverse need new factors to change anything.
    """
    return DenseEarly(interval)
