"""Tokenize a text into a folder of shards; a killed attempt is continued from its last finished shard."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TypeAlias

from transformers import PreTrainedTokenizerBase

from llm.data.preparation.chunking import batch_pieces
from llm.data.shards.format import FOLDER_MAGIC, MANIFEST, SPLITS, VERSION
from llm.data.shards.writer import ShardSpec, SplitWriter
from llm.data.sources.corpus import Corpus, no_text_error
from llm.data.sources.documents import Piece, Skipped, Split, format_skipped
from llm.files.atomic import write_text
from llm.system.units import format_duration
from llm.tokenization.encoder import Encoder

log = logging.getLogger(__name__)

# Tokens.
SHARD_SIZE = 100_000_000

_SECONDS_BETWEEN_LINES = 5.0
# Patterns for the names of unfinished files; no other file has such a name.
_UNFINISHED = (*(f".{split}_*.tmp" for split in SPLITS), f".{MANIFEST}.*.tmp")


class TokenizeProgress(NamedTuple):
    """How much of a text has been tokenized.

    Attributes:
        num_bytes: UTF-8 bytes of text read so far, including the text of shards that an earlier attempt finished.
        num_bytes_resumed: the part of `num_bytes` in these shards, which is read but not tokenized again.
        total_bytes: exact or approximate UTF-8 bytes of the whole text; None if unknown.
        num_tokens: ids in shards.
        num_documents: documents begun.
        seconds: time since this attempt began to tokenize.
    """

    num_bytes: int
    num_bytes_resumed: int
    total_bytes: int | None
    num_tokens: int
    num_documents: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """UTF-8 bytes of text that this attempt tokenized a second."""
        return (self.num_bytes - self.num_bytes_resumed) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the end of the text; None if its size or the speed is unknown."""
        if self.total_bytes is None or self.bytes_per_second == 0:
            return None
        return max(self.total_bytes - self.num_bytes, 0) / self.bytes_per_second


ProgressCallback: TypeAlias = Callable[[TokenizeProgress], None]


def write_shards(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    tokenizer_hash: str,
    shard_size: int,
    eos_in_single_text: bool,
    num_workers: int | None = None,
    on_progress: ProgressCallback | None = None,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Tokenize a text into a folder, continuing an earlier attempt with the same arguments that was killed.

    The tokenizer's end-of-text token follows each document, if the tokenizer has one. A document that is divided
    between the splits gets the token at its end only. The bytes of the shards do not depend on how often the work was
    interrupted: the text of finished shards is read again, but not tokenized again. Unfinished files of a killed
    attempt are removed, so no other process may write to the folder.

    Args:
        corpus: the text.
        tokenizer: encodes the text, without special tokens around it.
        folder: where to write the shards.
        tokenizer_hash: changes when the tokenizer does.
        shard_size: tokens of a shard.
        eos_in_single_text: whether a split that is one document also ends with the end-of-text token.
        num_workers: processes that encode; None: one for each core.
        on_progress: called after about every megabyte of text; None: a line is logged every few seconds.
        check: called before about every megabyte of text is written; an exception from it ends the work.

    Raises:
        UserError: the text cannot be read or holds nothing, or the folder holds shards of another text.
        OSError: the folder cannot be written.
    """
    if tokenizer.eos_token_id is None:
        log.warning("the tokenizer has no end-of-text token: documents are joined without one")
    check()
    _remove_unfinished(folder)
    skipped: Skipped = Counter()
    with Encoder(tokenizer, num_workers) as encoder, ExitStack() as stack:
        spec = ShardSpec(
            encoder.vocabulary_size, tokenizer_hash, shard_size, tokenizer.eos_token_id, eos_in_single_text
        )
        writers = {split: stack.enter_context(closing(SplitWriter(folder, split, spec))) for split in SPLITS}
        progress = _ProgressReporter(corpus, list(writers.values()), on_progress)
        _write_documents(corpus, encoder, writers, skipped, progress, check)
    progress.finish(skipped)
    check()
    _write_manifest(folder, corpus, spec, writers, skipped)


def _remove_unfinished(folder: Path) -> None:
    for pattern in _UNFINISHED:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _write_documents(
    corpus: Corpus,
    encoder: Encoder,
    writers: Mapping[Split, SplitWriter],
    skipped: Skipped,
    progress: _ProgressReporter,
    check: Callable[[], object],
) -> None:
    batches = batch_pieces(corpus.chunks(skipped), encoder, corpus.name)
    for batch, ids in encoder.encode_batches(_without_finished(batches, writers, progress)):
        for piece, piece_ids in zip(batch, ids, strict=True):
            writers[piece.split].add(piece, piece_ids)
        check()
        for writer in writers.values():
            writer.flush()
        progress.report()
    _require_text(corpus, writers, skipped)
    for writer in writers.values():
        writer.finish()


def _require_text(corpus: Corpus, writers: Mapping[Split, SplitWriter], skipped: Skipped) -> None:
    if writers["train"].num_documents == 0:
        raise no_text_error(corpus.name, skipped)
    if corpus.validation is not None and writers["validation"].num_documents == 0:
        raise no_text_error(f"the validation text of {corpus.name}", skipped)


def _write_manifest(
    folder: Path, corpus: Corpus, spec: ShardSpec, writers: Mapping[Split, SplitWriter], skipped: Skipped
) -> None:
    hashes = "".join(writer.text_hash for writer in writers.values())
    manifest = {
        "magic": FOLDER_MAGIC,
        "version": VERSION,
        "name": corpus.name,
        "data_hash": blake2b(hashes.encode(), digest_size=16).hexdigest(),
        "tokenizer_hash": spec.tokenizer_hash,
        "vocabulary_size": spec.vocabulary_size,
        "eos_token_id": spec.eos,
        "dtype": spec.dtype,
        "splits": {split: writer.facts for split, writer in writers.items()},
        "skipped": dict(skipped),
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _without_finished(
    batches: Iterable[list[Piece]], writers: Mapping[Split, SplitWriter], progress: _ProgressReporter
) -> Iterator[list[Piece]]:
    """Drop the pieces whose tokens are in finished shards, which are the first pieces of each split."""
    for batch in batches:
        remaining = [piece for piece in batch if not writers[piece.split].skip(piece)]
        if remaining:
            yield remaining
        else:
            progress.report()


class _ProgressReporter:
    """Reports the progress of tokenizing, to a callback or as a line every few seconds, and logs the result.

    Args:
        corpus: the text.
        writers: the writers of its splits.
        on_progress: receives the progress; None: lines are logged.
    """

    def __init__(self, corpus: Corpus, writers: list[SplitWriter], on_progress: ProgressCallback | None) -> None:
        self._corpus = corpus
        self._writers = writers
        self._on_progress = on_progress
        self._start = time.monotonic()
        self._last_line = self._start
        # Tokens of an earlier attempt: this attempt only reads their text.
        self._num_tokens_resumed = sum(writer.num_tokens for writer in writers)
        self._num_bytes_resumed = 0
        if self._num_tokens_resumed:
            log.info(
                "continuing after %s tokens in finished shards: reading the text up to there",
                f"{self._num_tokens_resumed:,}",
            )

    def report(self) -> None:
        """Call the callback, or log a line if the last one is old enough."""
        now = time.monotonic()
        if sum(writer.num_tokens for writer in self._writers) == self._num_tokens_resumed:
            self._num_bytes_resumed = sum(writer.num_bytes for writer in self._writers)
            self._start = now
        if self._on_progress is not None:
            self._on_progress(self._progress(now))
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            progress = self._progress(now)
            remaining = ""
            if progress.total_bytes is not None and progress.seconds_left is not None:
                percentage = min(100 * progress.num_bytes / max(progress.total_bytes, 1), 100)
                remaining = f", {percentage:.0f} %, eta {format_duration(progress.seconds_left)}"
            self._log_line("tokenizing", progress, remaining)

    def finish(self, skipped: Skipped) -> None:
        """Log the skipped rows and the result."""
        if skipped:
            log.warning("%s: skipped %s", self._corpus.name, format_skipped(skipped))
        self._log_line("tokenized", self._progress(time.monotonic()), "")

    def _progress(self, now: float) -> TokenizeProgress:
        return TokenizeProgress(
            num_bytes=sum(writer.num_bytes for writer in self._writers),
            num_bytes_resumed=self._num_bytes_resumed,
            total_bytes=self._corpus.num_bytes,
            num_tokens=sum(writer.num_tokens for writer in self._writers),
            num_documents=sum(writer.num_documents for writer in self._writers),
            seconds=now - self._start,
        )

    def _log_line(self, verb: str, progress: TokenizeProgress, remaining: str) -> None:
        log.info(
            "%s %s: %.1f MB, %.1f MB/s, %s documents, %s tokens, %.2f bytes a token%s",
            verb,
            self._corpus.name,
            progress.num_bytes / 1e6,
            progress.bytes_per_second / 1e6,
            f"{progress.num_documents:,}",
            f"{progress.num_tokens:,}",
            progress.num_bytes / max(progress.num_tokens, 1),
            remaining,
        )
