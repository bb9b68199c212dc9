"""From a text to a folder of shards: at once, or in as many attempts as it takes."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llm.data.corpus import Corpus, no_text
from llm.data.encoding import Encoder, Piece, batches
from llm.data.held_out import Split
from llm.data.parts import Skipped, describe
from llm.data.shards import FOLDER_MAGIC, MANIFEST, SPLITS, VERSION
from llm.data.split_writer import Form, SplitWriter
from llm.files.atomic import write_text

log = logging.getLogger(__name__)

SHARD_SIZE = 100_000_000

_SECONDS_BETWEEN_LINES = 5.0


def write_shards(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    tokenizer_hash: str,
    shard_size: int,
    eos_in_single_text: bool,
    num_workers: int | None = None,
) -> None:
    """Tokenizes a text into a folder, from where an earlier attempt with the same arguments was killed.

    The tokenizer's end-of-text token follows each document, if it has one. A document that is cut in
    two has it at its end only. The shards are the same bytes however often the work was interrupted:
    what finished shards hold is read again, but not tokenized again.

    Raises:
        UserError: the text cannot be read or holds nothing; or shards there are of something else.
        OSError: the folder cannot be written.
    """
    if tokenizer.eos_token_id is None:
        log.warning("the tokenizer has no end-of-text token: documents are joined without one")
    encoder = Encoder(tokenizer)
    skipped: Skipped = Counter()
    form = Form(encoder.vocabulary_size, tokenizer_hash, shard_size, tokenizer.eos_token_id, eos_in_single_text)
    writers = {split: SplitWriter(folder, split, form) for split in SPLITS}
    progress = _Progress(corpus, list(writers.values()))
    try:
        due = _not_in_shards(batches(corpus.parts(skipped), encoder), writers, progress)
        for batch, ids in encoder.encode_batches(due, num_workers):
            for piece, piece_ids in zip(batch, ids, strict=True):
                writers[piece.split].add(piece, piece_ids)
            for writer in writers.values():
                writer.flush()
            progress.tell()
        if writers["train"].num_documents == 0:
            raise no_text(corpus.name, skipped)
        if corpus.validation is not None and writers["validation"].num_documents == 0:
            raise no_text(f"the validation text of {corpus.name}", skipped)
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.close()
    progress.end(skipped)
    _write_manifest(folder, corpus, form, writers, skipped)


def _write_manifest(
    folder: Path, corpus: Corpus, form: Form, writers: Mapping[Split, SplitWriter], skipped: Skipped
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
    """Says every few seconds how far a long text is, and at the end what came of it."""

    def __init__(self, corpus: Corpus, writers: list[SplitWriter]) -> None:
        self._corpus = corpus
        self._writers = writers
        self._start = self._told = time.monotonic()
        # Tokens that an earlier attempt left: they cost this one nothing but reading.
        self._tokens_found = sum(writer.num_tokens for writer in writers)
        self._bytes_found = 0
        if self._tokens_found:
            log.info("continuing behind %s tokens in finished shards: reading on to there", f"{self._tokens_found:,}")

    def tell(self) -> None:
        now = time.monotonic()
        num_tokens, num_bytes = self._counts()
        if num_tokens == self._tokens_found:
            self._bytes_found = num_bytes
            self._start = now
        if now - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = now
            total = self._corpus.num_bytes
            speed = (num_bytes - self._bytes_found) / max(now - self._start, 1e-9)
            rest = ""
            if total is not None and speed > 0:
                left = max(total - num_bytes, 0)
                rest = f", {min(100 * num_bytes / max(total, 1), 100):.0f} %, eta {_clock(left / speed)}"
            self._line("tokenizing", now, rest)

    def end(self, skipped: Skipped) -> None:
        if skipped:
            log.warning("%s: skipped %s", self._corpus.name, describe(skipped))
        self._line("tokenized", time.monotonic(), "")

    def _counts(self) -> tuple[int, int]:
        tokens = sum(writer.num_tokens for writer in self._writers)
        return tokens, sum(writer.num_bytes for writer in self._writers)

    def _line(self, verb: str, now: float, rest: str) -> None:
        num_tokens, num_bytes = self._counts()
        log.info(
            "%s %s: %.1f MB, %.1f MB/s, %s documents, %s tokens, %.2f bytes a token%s",
            verb,
            self._corpus.name,
            num_bytes / 1e6,
            (num_bytes - self._bytes_found) / 1e6 / max(now - self._start, 1e-9),
            f"{sum(writer.num_documents for writer in self._writers):,}",
            f"{num_tokens:,}",
            num_bytes / max(num_tokens, 1),
            rest,
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
