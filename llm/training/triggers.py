"""When something is due, asked once an update instead of modulo tests strewn over the loop.

All take the number of finished updates, so `1` is the end of the first.
"""

from __future__ import annotations

from collections.abc import Callable

Trigger = Callable[[int], bool]


def every(num_steps: int | None) -> Trigger:
    """True after every `num_steps` updates; never when None."""
    return lambda step: num_steps is not None and step % num_steps == 0


def at_end(last_step: int) -> Trigger:
    """True after the last update."""
    return lambda step: step == last_step


def before(last_step: int) -> Trigger:
    """True until the last update, which has its own."""
    return lambda step: step < last_step


def every_epoch(num_blocks: int | None, global_batch: int) -> Trigger:
    """True after the update in which the last block of an epoch was read.

    Updates run across the epochs' boundaries, so this is the first update at or beyond one. Never where the
    length of an epoch is not known.
    """

    def due(step: int) -> bool:
        if num_blocks is None:
            return False
        return step * global_batch // num_blocks > (step - 1) * global_batch // num_blocks

    return due


def any_of(*dues: Trigger) -> Trigger:
    """True when one of them is."""
    return lambda step: any(due(step) for due in dues)


def all_of(*dues: Trigger) -> Trigger:
    """True when all of them are."""
    return lambda step: all(due(step) for due in dues)
