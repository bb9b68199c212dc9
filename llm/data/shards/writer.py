"""Writing one split: ids are appended to shards, and a killed process is continued exactly."""

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

# No byte of UTF-8 has this value, so that the hash depends on where documents end.
_BOUNDARY = b"\xff"


@dataclass(frozen=True)
class ShardSpec:
    """Facts that all shards of a text share.

    Attributes:
        vocabulary_size: every id is below it.
        tokenizer_hash: hash of the tokenizer's behaviour.
        shard_size: tokens of every shard of a split except the last one, which has fewer.
        eos: id of the end-of-text token, which follows each document; None: no token.
        eos_in_single_text: whether a split that is one document ends with the token, too.
    """

    vocabulary_size: int
    tokenizer_hash: str
    shard_size: int
    eos: int | None
    eos_in_single_text: bool

    @property
    def dtype(self) -> str:
        """`uint16` or `uint32`: the smaller type that holds every id."""
        return smallest_dtype(self.vocabulary_size)


class _ShardFile:
    """A shard that is being written, under a temporary name that no reader opens."""

    def __init__(self, path: Path, begins: ResumePoint, first: int) -> None:
        self.path = path
        self.begins = begins
        self.first = first
        self.num_tokens = 0
        # A unique name: a process that was believed to be dead may still write the same shard.
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        self._file = self._temporary.open("wb")
        self._hash = blake2b(digest_size=HASH_BYTES)
        self._min = 1 << 32
        self._max = -1

    def write(self, ids: NDArray[Any], dtype: str) -> None:
        """Append ids, integers [number of ids, at least 1]."""
        data = np.ascontiguousarray(ids, DTYPES[dtype]).data
        self._hash.update(data)
        self._file.write(data)
        self.num_tokens += len(ids)
        self._min = min(self._min, int(ids.min()))
        self._max = max(self._max, int(ids.max()))

    def finish(self, starts: list[int], ends: ResumePoint, spec: ShardSpec) -> Shard:
        """Give the files their names, the sidecar last."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        starts_data = np.array([start - self.first for start in starts], STARTS_DTYPE).tobytes()
        write_bytes(starts_path(self.path), starts_data)
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)
        shard = Shard(
            path=self.path,
            dtype=spec.dtype,
            num_tokens=self.num_tokens,
            num_documents=len(starts),
            tokenizer_hash=spec.tokenizer_hash,
            vocabulary_size=spec.vocabulary_size,
            min_id=self._min,
            max_id=self._max,
            token_hash=self._hash.hexdigest(),
            starts_hash=blake2b(starts_data, digest_size=HASH_BYTES).hexdigest(),
            begins=self.begins,
            ends=ends,
        )
        shard.write_sidecar()
        return shard

    def close(self) -> None:
        """Remove the unfinished shard."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class SplitWriter:
    """Appends the documents of one split to its shards.

    The caller passes every piece of the text in order, from the beginning, to `skip`; if that returns False, it
    passes the piece with its ids to `add`. Pieces in finished shards are skipped: they are counted and hashed again,
    but not encoded.

    Attributes:
        num_tokens: tokens written so far, without those that wait for `flush`.
        num_documents: documents that have begun.
        num_bytes: bytes of their text in UTF-8.
        num_shards: finished shards.
    """

    def __init__(self, folder: Path, split: Split, spec: ShardSpec) -> None:
        """Continue after the finished shards of a split, or start with none.

        Args:
            folder: the folder of the shards.
            split: the split to write.
            spec: facts that all shards share.

        Raises:
            ShardError: a finished shard is damaged, or was made with another tokenizer.
        """
        shards = finished_shards(folder, split, tokenizer_hash=spec.tokenizer_hash)
        self._folder = folder
        self._split = split
        self._spec = spec
        self._resume_point = shards[-1].ends if shards else ResumePoint(0, 0, 0)
        self._next = self._resume_point
        # Tokens of the first piece that lie in the last finished shard.
        self._num_written = self._resume_point.token
        self.num_shards = len(shards)
        self.num_tokens = sum(shard.num_tokens for shard in shards)
        self.num_documents = 0
        self.num_bytes = 0
        self._num_pieces = 0
        self._file: _ShardFile | None = None
        self._eos = np.array([] if spec.eos is None else [spec.eos], dtype=spec.dtype)
        self._eos_is_pending = False
        # Ids that wait for `flush`, one array a piece, with the document of each.
        self._runs: list[NDArray[Any]] = []
        self._documents: list[int] = []
        self._starts: list[int] = []
        self._num_waiting = 0
        self._text_hash = blake2b(digest_size=HASH_BYTES)

    def skip(self, piece: Piece) -> bool:
        """Return whether all of the piece lies in finished shards; it is then counted and needs no `add`."""
        if self._num_pieces >= self._resume_point.piece:
            return False
        self._account(piece)
        return True

    def add(self, piece: Piece, ids: NDArray[Any]) -> None:
        """Append a document or a piece of one, and the end-of-text token where the document ends.

        Args:
            piece: the text.
            ids: its token ids, an integer dtype, [number of ids].
        """
        eos_before, eos_after = self._account(piece)
        parts = [ids]
        if eos_before:
            parts.insert(0, self._eos)
        if eos_after:
            parts.append(self._eos)
        # All parts in the type of the file, half as much to copy; NumPy would otherwise widen mixed types.
        run = np.concatenate(parts, dtype=self._spec.dtype, casting="same_kind")
        num_written = 0 if self._runs else self._num_written
        start = self.num_tokens + self._num_waiting - num_written
        if eos_before:
            start += len(self._eos)
        if piece.begins and start >= self.num_tokens:
            self._starts.append(start)
        run = run[num_written:]
        self._runs.append(run)
        self._documents.append(self.num_documents - 1)
        self._num_waiting += len(run)

    def flush(self) -> None:
        """Write the ids that wait, and finish the shards that are full."""
        if not self._runs:
            return
        data = np.concatenate(self._runs)
        ends = np.cumsum([len(run) for run in self._runs])
        written = 0
        while written < len(data):
            if self._file is None:
                path = shard_path(self._folder, self._split, self.num_shards)
                self._file = _ShardFile(path, self._next, self.num_tokens)
            stop = min(len(data), written + self._spec.shard_size - self._file.num_tokens)
            self._file.write(data[written:stop], self._spec.dtype)
            self.num_tokens += stop - written
            written = stop
            # The first of the pieces that end here: a piece that has no tokens after this point is still to come.
            run = int(np.searchsorted(ends, stop, side="left"))
            in_run = stop - (int(ends[run - 1]) if run else 0) + (0 if run else self._num_written)
            first_piece = self._num_pieces - len(self._runs)
            self._next = ResumePoint(self._documents[run], first_piece + run, in_run)
            if self._file.num_tokens == self._spec.shard_size:
                self._finish_shard()
        self._runs = []
        self._documents = []
        self._num_waiting = 0
        self._num_written = 0

    def finish(self) -> None:
        """Write the ids that wait and finish the last shard, which may be short."""
        self.flush()
        if self._file is not None:
            self._finish_shard()

    def close(self) -> None:
        """Remove the shard that is not finished, if there is one."""
        if self._file is not None:
            self._file.close()

    def _finish_shard(self) -> None:
        assert self._file is not None
        num_starts = sum(start < self.num_tokens for start in self._starts)
        self._file.finish(self._starts[:num_starts], self._next, self._spec)
        self._starts = self._starts[num_starts:]
        self._file = None
        self.num_shards += 1

    def _account(self, piece: Piece) -> tuple[bool, bool]:
        """Count and hash a piece; return whether an end-of-text token stands before it, and after it."""
        eos_before = False
        if piece.begins:
            eos_before = self._eos_is_pending
            self._eos_is_pending = False
            if self.num_documents:
                self._text_hash.update(_BOUNDARY)
            self.num_documents += 1
        data = piece.text.encode()
        self.num_bytes += len(data)
        self._num_pieces += 1
        self._text_hash.update(data)
        if not piece.ends:
            return eos_before, False
        # Whether the first document is the only one is known when a second document begins.
        if self.num_documents == 1 and not self._spec.eos_in_single_text:
            self._eos_is_pending = True
            return eos_before, False
        return eos_before, True

    @property
    def text_hash(self) -> str:
        """Hash of the text and of where its documents end, 16 bytes in hexadecimal."""
        return self._text_hash.hexdigest()

    @property
    def facts(self) -> dict[str, int | str]:
        """The facts about the split that the manifest holds, under the keys of the manifest."""
        return {
            "num_shards": self.num_shards,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "text_hash": self.text_hash,
        }
