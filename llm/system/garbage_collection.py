"""Python's garbage collector, kept away from the objects that live as long as the run."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Collect garbage now, and exclude all objects that remain from later collections, until `unfreeze_heap`.

    Torch, transformers and the other parts of a run create about 400,000 objects that stay alive. One full collection
    of them took half a second, about every 130 steps of the 4 x 128 model: a thirtieth of the time. With several ranks
    it happens at different times on each, and the others wait. Objects created later are collected as usual.
    """
    gc.unfreeze()  # includes what an earlier run in this process has frozen
    gc.collect()
    gc.freeze()


def unfreeze_heap() -> None:
    """Include all objects in garbage collection again."""
    gc.unfreeze()
