"""Numbers that may change from update to update, and when something is due."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Number = float | Callable[[int], float]
"""A number, or a function of the number of the update (0-based)."""


def value_at(number: Number, step: int) -> float:
    """The number at that update."""
    return number(step) if callable(number) else number


def steady_value(number: Number, step: int) -> float:
    """As `value_at`, but what an interval is once the early updates are over."""
    return number.interval if isinstance(number, DenseEarly) else value_at(number, step)


def is_due(interval: Number, step: int) -> bool:
    """Whether the update's number is a multiple of the interval, in updates; 0 always is."""
    return step % max(1, int(value_at(interval, step))) == 0


def is_refresh_due(interval: Number, step: int, delay: float = 0.0) -> bool:
    """As `is_due`, and at 1, 2, 4, 8, … below the interval: the curvature of the first updates is soon out of date.

    Args:
        interval: in updates.
        step: number of the update.
        delay: by which share of the interval, 0 <= delay < 1, refreshes follow its multiples from the first one on; the
            early ones and that at 0 have none.
    """
    length = max(1, int(value_at(interval, step)))
    if step < length:
        return step & (step - 1) == 0
    return step % length == int(delay * length)


@dataclass(frozen=True)
class DenseEarly:
    """What `dense_early` makes."""

    interval: int

    def __call__(self, step: int) -> int:
        """1 where the update is due although it is no multiple."""
        return 1 if 0 < step < self.interval and step & (step - 1) == 0 else self.interval


def dense_early(interval: int) -> DenseEarly:
    """An interval that is kept except at the updates 1, 2, 4, 8, … below it, which are due too.

    For `factor_update_steps`: refreshing an inverse early says nothing new unless its factor is new.
    """
    return DenseEarly(interval)
