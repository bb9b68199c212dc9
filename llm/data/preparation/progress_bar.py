"""Progress bar of tokenizing on a terminal; without a terminal the progress is logged instead."""

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
    """Show a progress bar while the block runs: MB, MB/s, tokens and the time left.

    Yields:
        The callback that updates the bar; None if the standard error is not a terminal.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    # The delay avoids a bar for cached text, which opens at once. smoothing=0 shows the mean speed; miniters=0 shows
    # every update.
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

        def show(progress: TokenizeProgress) -> None:
            # The speed of this process excludes the shards that an earlier process finished.
            bar.initial = progress.num_bytes_resumed
            bar.start_t = time.time() - progress.seconds
            bar.total = progress.total_bytes
            bar.set_postfix_str(f"{progress.num_tokens / 1e6:.1f}M tokens", refresh=False)
            bar.update(progress.num_bytes - bar.n)

        yield show
