"""One row of a batch: the token ids of a block, and what is known about each of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Row(NamedTuple):
    """The tokens of one block and the token after it, which is only predicted.

    The arrays are read-only for the receiver: `ids` may be a view of a memory-mapped file.

    Attributes:
        ids: integers [block + 1], in the type of the shards (uint16 or uint32) or another integer type.
        positions: position of each token in its document, int32 [block + 1]; a block that begins inside a document
            counts from 0 there. None: attention is not limited to documents.
        loss_mask: bool [block + 1]; a token whose entry is False is read but not predicted. Entry 0 has no effect,
            since the first token of a block is never predicted in it. None: all tokens are predicted.
    """

    ids: NDArray[Any]
    positions: NDArray[np.int32] | None = None
    loss_mask: NDArray[np.bool_] | None = None
