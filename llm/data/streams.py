"""The tokenized text, kept on disk: a second start, or another block size, tokenizes nothing.

A stream is one plain file of token ids, little-endian uint16 or uint32 as the vocabulary needs. The
streams of a text lie in one folder, named by a hash of the text's fingerprint and the tokenizer's:
`train.bin`, `validation.bin` and `manifest.json`. The folder gets that name when it is whole.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llm.config.errors import UserError
from llm.config.options import DataOptions
from llm.data.corpus import Corpus, no_text
from llm.data.encoding import Encoder, batches, encoding_threads
from llm.data.held_out import Split
from llm.data.parts import Skipped, describe
from llm.data.stream_files import SplitWriter
from llm.files.atomic import sync_folder, sync_tree, write_text

log = logging.getLogger(__name__)

_VERSION = 1
_MANIFEST = "manifest.json"
_SPLITS: tuple[Split, ...] = ("train", "validation")
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_UNTIL_ABANDONED = 24 * 3600.0


@dataclass(frozen=True)
class Stream:
    """The tokens of one split.

    Attributes:
        tokens: uint16 or uint32 [number of tokens], mapped from the file.
        num_documents: documents, a piece of a document that was cut in two counting as one.
        num_bytes: bytes of the text in UTF-8.
    """

    tokens: NDArray[Any]
    num_documents: int
    num_bytes: int


@dataclass(frozen=True)
class Streams:
    """A tokenized text.

    Attributes:
        train: the tokens to train on.
        validation: the tokens held out, None if there are none.
        skipped: rows that were no text, by reason.
        data_hash: hash of the text of both splits.
        vocabulary_size: every id is below it.
        dir: the folder of the files.
    """

    train: Stream
    validation: Stream | None
    skipped: Mapping[str, int]
    data_hash: str
    vocabulary_size: int
    dir: Path


def find_streams(
    corpus: Corpus, *, tokenizer_hash: str, cache_dir: Path, eos_in_single_text: bool = True
) -> Streams | None:
    """The streams that an earlier `tokenize` with the same arguments left, None if there are none.

    The sizes of the files are checked, not their content: opening takes the same time for any text.
    """
    return _open(_folder_of(corpus, tokenizer_hash, eos_in_single_text, cache_dir))


def tokenize(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokenizer_hash: str,
    options: DataOptions,
    cache_dir: Path,
    eos_in_single_text: bool = True,
) -> Streams:
    """The streams of a text: from the cache, or else made and put there.

    The tokenizer's end-of-text token follows each document, if it has one. A document that is cut
    in two has it at its end only.

    Args:
        corpus: the text.
        tokenizer: gives the ids, without special tokens around a text.
        tokenizer_hash: changes when the tokenizer does.
        options: whether to tokenize again, and with how many threads.
        cache_dir: where streams are kept, in a folder `tokens`.
        eos_in_single_text: whether a split that is one document ends with the token, too.

    Raises:
        UserError: the text cannot be read, holds nothing, or the cache cannot be written.
    """
    folder = _folder_of(corpus, tokenizer_hash, eos_in_single_text, cache_dir)
    found = None if options.overwrite_cache else _open(folder)
    if found is not None:
        log.info("tokens of %s: from the cache %s", corpus.name, folder)
        return found
    if tokenizer.eos_token_id is None:
        log.warning("the tokenizer has no end-of-text token: documents are joined without one")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        _remove_abandoned(folder)
        with encoding_threads(options.preprocessing_num_workers):
            _write(corpus, tokenizer, temporary, tokenizer_hash, eos_in_single_text)
        _put_in_place(temporary, folder, replace=options.overwrite_cache)
    except OSError as error:
        raise UserError(
            f"the token cache {folder.parent} cannot be written ({error.strerror});"
            " make room, or set HF_HOME to another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    made = _open(folder)
    if made is None:
        raise UserError(f"the token cache {folder} vanished while it was written; start again")
    return made


def _folder_of(corpus: Corpus, tokenizer_hash: str, eos_in_single_text: bool, cache_dir: Path) -> Path:
    facts = json.dumps([_VERSION, corpus.fingerprint, tokenizer_hash, eos_in_single_text])
    return cache_dir / "tokens" / blake2b(facts.encode(), digest_size=16).hexdigest()


def _open(folder: Path) -> Streams | None:
    """The streams in a folder, None if it is not there or damaged (which is said)."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        streams = {
            split: _open_split(folder / f"{split}.bin", manifest["dtype"], facts)
            for split, facts in manifest["splits"].items()
        }
        validation = streams["validation"]
        return Streams(
            streams["train"],
            validation if validation.tokens.size else None,
            manifest["skipped"],
            manifest["data_hash"],
            manifest["vocabulary_size"],
            folder,
        )
    except FileNotFoundError:
        if folder.exists():
            log.warning("the token cache %s lacks a file: tokenizing again", folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the token cache %s is damaged (%s): tokenizing again", folder, error)
    return None


def _open_split(path: Path, dtype: str, facts: dict[str, Any]) -> Stream:
    if dtype not in ("uint16", "uint32"):
        raise ValueError(f"unknown type {dtype}")
    kind = np.dtype(dtype).newbyteorder("<")
    size, due = path.stat().st_size, facts["num_tokens"] * kind.itemsize
    if size != due:
        raise ValueError(f"{path.name} has {size} bytes instead of {due}")
    # An empty file cannot be mapped.
    tokens = np.memmap(path, kind, mode="r") if size else np.zeros(0, kind)
    return Stream(tokens, facts["num_documents"], facts["num_bytes"])


def _write(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    tokenizer_hash: str,
    eos_in_single_text: bool,
) -> None:
    """Tokenizes the text into a folder."""
    encoder = Encoder(tokenizer)
    skipped: Skipped = Counter()
    dtype = np.dtype("<u2" if encoder.vocabulary_size <= 1 << 16 else "<u4")
    eos = tokenizer.eos_token_id
    writers = {split: SplitWriter(folder / f"{split}.bin", dtype, eos, eos_in_single_text) for split in _SPLITS}
    progress = _Progress(corpus.name)
    try:
        for batch in batches(corpus.parts(skipped), encoder):
            ids = encoder.encode([piece.text for piece in batch])
            for piece, piece_ids in zip(batch, ids, strict=True):
                writers[piece.split].add(piece, piece_ids)
            for writer in writers.values():
                writer.flush()
            progress.tell(list(writers.values()))
    finally:
        for writer in writers.values():
            writer.close()
    if writers["train"].num_documents == 0:
        raise no_text(corpus.name, skipped)
    if corpus.validation is not None and writers["validation"].num_documents == 0:
        raise no_text(f"the validation text of {corpus.name}", skipped)
    progress.end(list(writers.values()), skipped)
    hashes = "".join(writer.text_hash for writer in writers.values())
    manifest = {
        "version": _VERSION,
        "name": corpus.name,
        "data_hash": blake2b(hashes.encode(), digest_size=16).hexdigest(),
        "tokenizer_hash": tokenizer_hash,
        "vocabulary_size": encoder.vocabulary_size,
        "eos_token_id": eos,
        "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
        "splits": {split: writer.facts for split, writer in writers.items()},
        "skipped": dict(skipped),
    }
    write_text(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _put_in_place(temporary: Path, folder: Path, *, replace: bool) -> None:
    """Gives a whole folder its name, unless another process was faster and left a good one."""
    sync_tree(temporary)
    while True:
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            sync_folder(folder.parent)
            return
        if not replace and _open(folder) is not None:
            return
        replace = False
        # Whoever has the old files mapped keeps them until it ends.
        old = temporary.with_suffix(".old")
        try:
            folder.rename(old)
        except FileNotFoundError:
            continue
        shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed processes left of the same streams."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        try:
            newest = max(file.stat().st_mtime for file in [path, *path.iterdir()])
        except OSError:
            continue
        if time.time() - newest > _SECONDS_UNTIL_ABANDONED:
            shutil.rmtree(path, ignore_errors=True)


class _Progress:
    """Says every few seconds how far a long text is, and at the end what came of it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._start = self._told = time.monotonic()

    def tell(self, writers: list[SplitWriter]) -> None:
        now = time.monotonic()
        if now - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = now
            self._line("tokenizing", writers, now)

    def end(self, writers: list[SplitWriter], skipped: Skipped) -> None:
        if skipped:
            log.warning("%s: skipped %s", self._name, describe(skipped))
        self._line("tokenized", writers, time.monotonic())

    def _line(self, verb: str, writers: list[SplitWriter], now: float) -> None:
        num_bytes = sum(writer.num_bytes for writer in writers)
        num_tokens = sum(writer.num_tokens for writer in writers)
        seconds = max(now - self._start, 1e-9)
        log.info(
            "%s %s: %.1f MB, %.1f MB/s, %s documents, %s tokens, %.2f bytes a token",
            verb,
            self._name,
            num_bytes / 1e6,
            num_bytes / 1e6 / seconds,
            f"{sum(writer.num_documents for writer in writers):,}",
            f"{num_tokens:,}",
            num_bytes / max(num_tokens, 1),
        )
