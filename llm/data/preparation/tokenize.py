"""From a text to a folder of shards: at once, or in as many attempts as it takes."""

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

SHARD_SIZE = 100_000_000

_SECONDS_BETWEEN_LINES = 5.0
# Names of files that are being written, which nothing else gives.
_UNFINISHED = (*(f".{split}_*.tmp" for split in SPLITS), f".{MANIFEST}.*.tmp")


class TokenizeProgress(NamedTuple):
    """How far tokenizing is.

    Attributes:
        num_bytes: bytes of text in UTF-8 read so far, those of shards found finished included.
        num_bytes_found: of these, bytes in shards found finished, which cost reading only.
        total_bytes: of the whole text, or about so many; None where nobody knows.
        num_tokens: ids in shards.
        num_documents: documents begun.
        seconds: since the first text that was not found finished.
    """

    num_bytes: int
    num_bytes_found: int
    total_bytes: int | None
    num_tokens: int
    num_documents: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Of what this process tokenized."""
        return (self.num_bytes - self.num_bytes_found) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """None where nobody knows."""
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
    """Tokenizes a text into a folder, from where an earlier attempt with the same arguments was killed.

    The tokenizer's end-of-text token follows each document, if it has one. A document that is cut in
    two has it at its end only. The shards are the same bytes however often the work was interrupted:
    what finished shards hold is read again, but not tokenized again. What an attempt that was killed left
    unfinished is removed: the folder is this process's alone.

    Args:
        corpus: the text.
        tokenizer: gives the ids, without special tokens around a text.
        folder: where the shards lie, or will.
        tokenizer_hash: changes when the tokenizer does.
        shard_size: tokens of a shard.
        eos_in_single_text: whether a split that is one document ends with the token, too.
        num_workers: processes that encode, None: one for each core.
        on_progress: shown how far it is after every megabyte or so, None: a line is logged every few seconds.
        check: called before every megabyte or so that is written; what it raises ends the work.

    Raises:
        UserError: the text cannot be read or holds nothing; or shards there are of something else.
        OSError: the folder cannot be written.
    """
    if tokenizer.eos_token_id is None:
        log.warning("the tokenizer has no end-of-text token: documents are joined without one")
    check()
    _remove_unfinished(folder)
    skipped: Skipped = Counter()
    with Encoder(tokenizer, num_workers) as encoder, ExitStack() as stack:
        form = ShardSpec(
            encoder.vocabulary_size, tokenizer_hash, shard_size, tokenizer.eos_token_id, eos_in_single_text
        )
        writers = {split: stack.enter_context(closing(SplitWriter(folder, split, form))) for split in SPLITS}
        progress = _Progress(corpus, list(writers.values()), on_progress)
        _write_documents(corpus, encoder, writers, skipped, progress, check)
    progress.end(skipped)
    check()
    _write_manifest(folder, corpus, form, writers, skipped)


def _remove_unfinished(folder: Path) -> None:
    for pattern in _UNFINISHED:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _write_documents(
    corpus: Corpus,
    encoder: Encoder,
    writers: Mapping[Split, SplitWriter],
    skipped: Skipped,
    progress: _Progress,
    check: Callable[[], object],
) -> None:
    found = batch_pieces(corpus.chunks(skipped), encoder, corpus.name)
    for batch, ids in encoder.encode_batches(_not_in_shards(found, writers, progress)):
        for piece, piece_ids in zip(batch, ids, strict=True):
            writers[piece.split].add(piece, piece_ids)
        check()
        for writer in writers.values():
            writer.flush()
        progress.tell()
    _require_text(corpus, writers, skipped)
    for writer in writers.values():
        writer.finish()


def _require_text(corpus: Corpus, writers: Mapping[Split, SplitWriter], skipped: Skipped) -> None:
    if writers["train"].num_documents == 0:
        raise no_text_error(corpus.name, skipped)
    if corpus.validation is not None and writers["validation"].num_documents == 0:
        raise no_text_error(f"the validation text of {corpus.name}", skipped)


def _write_manifest(
    folder: Path, corpus: Corpus, form: ShardSpec, writers: Mapping[Split, SplitWriter], skipped: Skipped
) -> None:
    hashes = "".join(writer.text_hash for writer in writers.values())
    manifest = {
        "magic": FOLDER_MAGIC,
        "version": VERSION,
        "name": corpus.name,
        "data_hash": blake2b(hashes.encode(), digest_size=16).hexdigest(),
        "tokenizer_hash": form.tokenizer_hash,
        "vocabulary_size": form.vocabulary_size,
        "eos_token_id": form.eos,
        "dtype": form.dtype,
        "splits": {split: writer.facts for split, writer in writers.items()},
        "skipped": dict(skipped),
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _not_in_shards(
    found: Iterable[list[Piece]], writers: Mapping[Split, SplitWriter], progress: _Progress
) -> Iterator[list[Piece]]:
    """The pieces that finished shards do not hold; the others come first in each split, and are done with here."""
    for batch in found:
        due = [piece for piece in batch if not writers[piece.split].skip(piece)]
        if due:
            yield due
        else:
            progress.tell()


class _Progress:
    """Shows how far a long text is, or says it every few seconds, and at the end what came of it."""

    def __init__(self, corpus: Corpus, writers: list[SplitWriter], on_progress: ProgressCallback | None) -> None:
        self._corpus = corpus
        self._writers = writers
        self._on_progress = on_progress
        self._start = self._told = time.monotonic()
        # Tokens that an earlier attempt left: they cost this one nothing but reading.
        self._tokens_found = sum(writer.num_tokens for writer in writers)
        self._bytes_found = 0
        if self._tokens_found:
            log.info("continuing behind %s tokens in finished shards: reading on to there", f"{self._tokens_found:,}")

    def tell(self) -> None:
        now = time.monotonic()
        if sum(writer.num_tokens for writer in self._writers) == self._tokens_found:
            self._bytes_found = sum(writer.num_bytes for writer in self._writers)
            self._start = now
        if self._on_progress is not None:
            self._on_progress(self._counts(now))
        elif now - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = now
            counts = self._counts(now)
            rest = ""
            if counts.total_bytes is not None and counts.seconds_left is not None:
                share = min(100 * counts.num_bytes / max(counts.total_bytes, 1), 100)
                rest = f", {share:.0f} %, eta {format_duration(counts.seconds_left)}"
            self._line("tokenizing", counts, rest)

    def end(self, skipped: Skipped) -> None:
        if skipped:
            log.warning("%s: skipped %s", self._corpus.name, format_skipped(skipped))
        self._line("tokenized", self._counts(time.monotonic()), "")

    def _counts(self, now: float) -> TokenizeProgress:
        return TokenizeProgress(
            num_bytes=sum(writer.num_bytes for writer in self._writers),
            num_bytes_found=self._bytes_found,
            total_bytes=self._corpus.num_bytes,
            num_tokens=sum(writer.num_tokens for writer in self._writers),
            num_documents=sum(writer.num_documents for writer in self._writers),
            seconds=now - self._start,
        )

    def _line(self, verb: str, counts: TokenizeProgress, rest: str) -> None:
        log.info(
            "%s %s: %.1f MB, %.1f MB/s, %s documents, %s tokens, %.2f bytes a token%s",
            verb,
            self._corpus.name,
            counts.num_bytes / 1e6,
            counts.bytes_per_second / 1e6,
            f"{counts.num_documents:,}",
            f"{counts.num_tokens:,}",
            counts.num_bytes / max(counts.num_tokens, 1),
            rest,
        )
