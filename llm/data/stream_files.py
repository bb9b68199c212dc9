"""Writing one stream: ids appended to a file, with everything the manifest says about them."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.data.encoding import Piece

# No byte of UTF-8 has this value, so that the hash sees where documents end.
_BOUNDARY = b"\xff"


class SplitWriter:
    """Appends the documents of one split to a file.

    Attributes:
        num_tokens: ids so far, without those that wait for `flush`.
        num_documents: documents begun.
        num_bytes: bytes of their text in UTF-8.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], eos: int | None, eos_in_single_text: bool) -> None:
        self.num_tokens = 0
        self.num_documents = 0
        self.num_bytes = 0
        self._file = path.open("wb")
        self._dtype = dtype
        self._eos = np.array([] if eos is None else [eos], dtype=np.uint32)
        self._eos_in_single_text = eos_in_single_text
        self._eos_is_due = False
        self._waiting: list[NDArray[np.uint32]] = []
        self._text_hash = blake2b(digest_size=16)
        self._token_hash = blake2b(digest_size=16)

    def add(self, piece: Piece, ids: NDArray[np.uint32]) -> None:
        """Appends a document, or a piece of one, and the end-of-text token where it ends."""
        if piece.begins:
            if self._eos_is_due:
                self._waiting.append(self._eos)
                self._eos_is_due = False
            if self.num_documents:
                self._text_hash.update(_BOUNDARY)
            self.num_documents += 1
        data = piece.text.encode()
        self.num_bytes += len(data)
        self._text_hash.update(data)
        self._waiting.append(ids)
        if piece.ends:
            # Whether the first document is the only one is known when a second begins.
            if self.num_documents == 1 and not self._eos_in_single_text:
                self._eos_is_due = True
            else:
                self._waiting.append(self._eos)

    def flush(self) -> None:
        """Writes what waits."""
        if not self._waiting:
            return
        data = np.concatenate(self._waiting).astype(self._dtype).tobytes()
        self._waiting = []
        self._token_hash.update(data)
        self._file.write(data)
        self.num_tokens += len(data) // self._dtype.itemsize

    def close(self) -> None:
        """Closes the file; what waits is not written."""
        self._file.close()

    @property
    def text_hash(self) -> str:
        """Hash of the text and of where its documents end."""
        return self._text_hash.hexdigest()

    @property
    def facts(self) -> dict[str, int | str]:
        """What the manifest says about the stream."""
        return {
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "text_hash": self.text_hash,
            "token_hash": self._token_hash.hexdigest(),
        }
