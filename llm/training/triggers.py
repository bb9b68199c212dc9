"""Triggers: after which updates something is due.

A trigger takes the number of finished updates, so `1` is the end of the first.
"""

from __future__ import annotations

from collections.abc import Callable

Trigger = Callable[[int], bool]


def every(num_steps: int | None) -> Trigger:
    """Return a trigger for every `num_steps`-th update; None never triggers."""
    return lambda step: num_steps is not None and step % num_steps == 0


def at_end(last_step: int) -> Trigger:
    """Return a trigger for the last update of the run."""
    return lambda step: step == last_step


def before(last_step: int) -> Trigger:
    """Return a trigger for all updates but the last."""
    return lambda step: step < last_step


def every_epoch(num_blocks: int | None, global_batch: int) -> Trigger:
    """Return a trigger for the update in which the last block of an epoch was read.

    Updates run across the ends of epochs, so this is the first update that reaches or passes one. It never triggers
    where the length of an epoch is not known.

    Args:
        num_blocks: blocks of one epoch; None if unknown.
        global_batch: blocks of one update.
    """

    def trigger(step: int) -> bool:
        if num_blocks is None:
            return False
        return step * global_batch // num_blocks > (step - 1) * global_batch // num_blocks

    return trigger


def any_of(*triggers: Trigger) -> Trigger:
    """Return a trigger that is true when one of the given triggers is."""
    return lambda step: any(trigger(step) for trigger in triggers)


def all_of(*triggers: Trigger) -> Trigger:
    """Return a trigger that is true when all given triggers are."""
    return lambda step: all(trigger(step) for trigger in triggers)
