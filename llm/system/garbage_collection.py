"""Python's search for garbage in circles of references, kept away from the updates."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Collects what is garbage now, and takes all that is left out of the searches to come, until `unfreeze_heap`.

    Torch, transformers and the rest of a run leave some 400,000 objects that stay. A search through them took half a
    second about every 130 updates of 4 x 128, a thirtieth of the time, and on several ranks at different times, for
    which the others wait. What is made later is searched as before.
    """
    gc.unfreeze()  # what an earlier run left
    gc.collect()
    gc.freeze()


def unfreeze_heap() -> None:
    """Lets searches see everything again."""
    gc.unfreeze()
