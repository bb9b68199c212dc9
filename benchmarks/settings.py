"""The setting that all measured programs share: start, data, sizes and hyperparameters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BETAS = (0.9, 0.999)  # those of run_clm, which has no option for them
WEIGHT_DECAY = 0.1
# There is no warm-up: at a higher rate the loss of the wider models rises at first.
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Setting:
    """Setting of all programs of a measurement.

    Attributes:
        start_dir: folder of an HF model, a tokenizer of its vocabulary, and nanoGPT's checkpoint if nanoGPT is
            measured.
        model_type: type of the model, as in its config.json.
        data_dir: folder with `train.bin`, uint16 ids.
        block_size: targets per block.
        micro_batch: blocks per step.
        num_updates: number of steps that the blocks suffice for; afterwards they repeat.
        device: `cpu` or `cuda`.
        nanogpt_dir: folder of nanoGPT; None if it is not measured.
    """

    start_dir: str
    model_type: str
    data_dir: str
    block_size: int
    micro_batch: int
    num_updates: int
    device: str
    nanogpt_dir: str | None

    def write(self, path: Path) -> None:
        """Write the setting to a file, as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Setting:
        """Return the setting that `write` wrote."""
        return cls(**json.loads(path.read_text()))

    def ids(self) -> NDArray[np.uint16]:
        """Return all token ids, uint16 [tokens]."""
        return np.fromfile(Path(self.data_dir, "train.bin"), np.uint16)

    def blocks(self) -> Iterator[NDArray[np.int64]]:
        """Yield blocks, int64 [block_size + 1]; the last target of a block is the first input of the next one."""
        ids = self.ids().astype(np.int64)
        for start in range(0, self.num_updates * self.micro_batch * self.block_size, self.block_size):
            yield ids[start : start + self.block_size + 1]
