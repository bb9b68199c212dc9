"""Writing one split: ids appended to shards, continued exactly where an earlier process was killed."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.data.shards.format import (
    DTYPES,
    HASH_BYTES,
    STARTS_DTYPE,
    ResumePoint,
    Shard,
    finished_shards,
    shard_path,
    starts_path,
)
from llm.data.sources.documents import Piece, Split
from llm.files.atomic import sync_folder, write_bytes
from llm.tokenization.encoder import smallest_dtype

# No byte of UTF-8 has this value, so that the hash sees where documents end.
_BOUNDARY = b"\xff"


@dataclass(frozen=True)
class ShardSpec:
    """What all shards of a text share.

    Attributes:
        vocabulary_size: every id is below it.
        tokenizer_hash: of the tokenizer's behaviour.
        shard_size: tokens of every shard of a split but its last, which has fewer.
        eos: the end-of-text token, which follows each document; None for none.
        eos_in_single_text: whether a split that is one document ends with the token, too.
    """

    vocabulary_size: int
    tokenizer_hash: str
    shard_size: int
    eos: int | None
    eos_in_single_text: bool

    @property
    def dtype(self) -> str:
        """The smaller type that holds every id."""
        return smallest_dtype(self.vocabulary_size)


class _File:
    """A shard that is being written, under a name that nobody reads."""

    def __init__(self, path: Path, begins: ResumePoint, first: int) -> None:
        self.path = path
        self.begins = begins
        self.first = first
        self.num_tokens = 0
        # A name of its own: a process that was taken for dead may still write the same shard.
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        self._file = self._temporary.open("wb")
        self._hash = blake2b(digest_size=HASH_BYTES)
        self._min, self._max = 1 << 32, -1

    def write(self, ids: NDArray[Any], dtype: str) -> None:
        data = np.ascontiguousarray(ids, DTYPES[dtype]).data
        self._hash.update(data)
        self._file.write(data)
        self.num_tokens += len(ids)
        self._min, self._max = min(self._min, int(ids.min())), max(self._max, int(ids.max()))

    def finish(self, starts: list[int], ends: ResumePoint, form: ShardSpec) -> Shard:
        """Gives the files their names, the sidecar last."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        found = np.array([start - self.first for start in starts], STARTS_DTYPE).tobytes()
        write_bytes(starts_path(self.path), found)
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)
        shard = Shard(
            path=self.path,
            dtype=form.dtype,
            num_tokens=self.num_tokens,
            num_documents=len(starts),
            tokenizer_hash=form.tokenizer_hash,
            vocabulary_size=form.vocabulary_size,
            min_id=self._min,
            max_id=self._max,
            token_hash=self._hash.hexdigest(),
            starts_hash=blake2b(found, digest_size=HASH_BYTES).hexdigest(),
            begins=self.begins,
            ends=ends,
        )
        shard.write_sidecar()
        return shard

    def close(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class SplitWriter:
    """Appends the documents of one split to its shards.

    Every piece of the text is given in order, from its beginning on, to `skip`, and if that says no,
    with its ids to `add`. What lies in finished shards is skipped: it is counted and hashed again,
    but not encoded.

    Attributes:
        num_tokens: ids so far, without those that wait for `flush`.
        num_documents: documents begun.
        num_bytes: bytes of their text in UTF-8.
        num_shards: finished shards.
    """

    def __init__(self, folder: Path, split: Split, form: ShardSpec) -> None:
        shards = finished_shards(folder, split, tokenizer_hash=form.tokenizer_hash)
        self._folder, self._split, self._form = folder, split, form
        self._resumed = shards[-1].ends if shards else ResumePoint(0, 0, 0)
        self._next = self._resumed
        self._cut_at = self._resumed.token
        self.num_shards = len(shards)
        self.num_tokens = sum(shard.num_tokens for shard in shards)
        self.num_documents = 0
        self.num_bytes = 0
        self._num_pieces = 0
        self._file: _File | None = None
        self._eos = np.array([] if form.eos is None else [form.eos], dtype=form.dtype)
        self._eos_is_due = False
        self._runs: list[NDArray[Any]] = []
        self._documents: list[int] = []
        self._starts: list[int] = []
        self._num_waiting = 0
        self._text_hash = blake2b(digest_size=HASH_BYTES)

    def skip(self, piece: Piece) -> bool:
        """Whether the piece lies whole in shards that are finished; it is then done with."""
        if self._num_pieces >= self._resumed.piece:
            return False
        self._account(piece)
        return True

    def add(self, piece: Piece, ids: NDArray[Any]) -> None:
        """Appends a document, or a piece of one, and the end-of-text token where it ends."""
        in_front, behind = self._account(piece)
        # All in the type of the file, half as much to copy; a text in several types mixes them.
        run = np.concatenate(
            [self._eos] * in_front + [ids] + [self._eos] * behind, dtype=self._form.dtype, casting="same_kind"
        )
        # The head of the first run lies in the last finished shard.
        cut = 0 if self._runs else self._cut_at
        start = self.num_tokens + self._num_waiting - cut + in_front * len(self._eos)
        if piece.begins and start >= self.num_tokens:
            self._starts.append(start)
        run = run[cut:]
        self._runs.append(run)
        self._documents.append(self.num_documents - 1)
        self._num_waiting += len(run)

    def flush(self) -> None:
        """Writes what waits, and finishes the shards that are full."""
        if not self._runs:
            return
        data = np.concatenate(self._runs)
        ends = np.cumsum([len(run) for run in self._runs])
        written = 0
        while written < len(data):
            if self._file is None:
                path = shard_path(self._folder, self._split, self.num_shards)
                self._file = _File(path, self._next, self.num_tokens)
            stop = min(len(data), written + self._form.shard_size - self._file.num_tokens)
            self._file.write(data[written:stop], self._form.dtype)
            self.num_tokens += stop - written
            written = stop
            # The first of the pieces that end here: a piece without tokens behind it is still to come.
            run = int(np.searchsorted(ends, stop, side="left"))
            in_run = stop - (int(ends[run - 1]) if run else 0) + (0 if run else self._cut_at)
            first_piece = self._num_pieces - len(self._runs)
            self._next = ResumePoint(self._documents[run], first_piece + run, in_run)
            if self._file.num_tokens == self._form.shard_size:
                self._finish_shard()
        self._runs, self._documents, self._num_waiting, self._cut_at = [], [], 0, 0

    def finish(self) -> None:
        """Finishes the last shard, which may be short."""
        self.flush()
        if self._file is not None:
            self._finish_shard()

    def close(self) -> None:
        """Throws away a shard that is not finished."""
        if self._file is not None:
            self._file.close()

    def _finish_shard(self) -> None:
        assert self._file is not None
        number = sum(start < self.num_tokens for start in self._starts)
        self._file.finish(self._starts[:number], self._next, self._form)
        self._starts = self._starts[number:]
        self._file = None
        self.num_shards += 1

    def _account(self, piece: Piece) -> tuple[bool, bool]:
        """Counts and hashes a piece; whether an end-of-text token stands in front of it, and behind it."""
        in_front = behind = False
        if piece.begins:
            in_front, self._eos_is_due = self._eos_is_due, False
            if self.num_documents:
                self._text_hash.update(_BOUNDARY)
            self.num_documents += 1
        data = piece.text.encode()
        self.num_bytes += len(data)
        self._num_pieces += 1
        self._text_hash.update(data)
        if piece.ends:
            # Whether the first document is the only one is known when a second begins.
            if self.num_documents == 1 and not self._form.eos_in_single_text:
                self._eos_is_due = True
            else:
                behind = True
        return in_front, behind

    @property
    def text_hash(self) -> str:
        """Hash of the text and of where its documents end."""
        return self._text_hash.hexdigest()

    @property
    def facts(self) -> dict[str, int | str]:
        """What the manifest says about the split."""
        return {
            "num_shards": self.num_shards,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "text_hash": self.text_hash,
        }
