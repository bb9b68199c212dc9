"""A progress bar of tokenizing, on a terminal; elsewhere the lines that are logged say how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from llm.data.preparation.tokenize import ProgressCallback, TokenizeProgress

_DELAY_SECONDS = 0.5


@contextmanager
def text_progress_bar() -> Iterator[ProgressCallback | None]:
    """What to show the progress to while the block runs: MB, MB/s, tokens and the time left.

    None if the standard error is no terminal. The bar goes with the block.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    # Not for what is in the cache: it is there at once. The speed is the mean, and no update too small to show.
    with tqdm(
        desc="tokenizing",
        unit="B",
        unit_scale=True,
        delay=_DELAY_SECONDS,
        smoothing=0,
        miniters=0,
        dynamic_ncols=True,
        leave=False,
    ) as bar:

        def show(counts: TokenizeProgress) -> None:
            # What an earlier attempt left tells nothing of the speed of this one.
            bar.initial, bar.start_t = counts.num_bytes_found, time.time() - counts.seconds
            bar.total = counts.total_bytes
            bar.set_postfix_str(f"{counts.num_tokens / 1e6:.1f}M tokens", refresh=False)
            bar.update(counts.num_bytes - bar.n)

        yield show
