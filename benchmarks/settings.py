"""What all measured programs are told, and the hyperparameters that they share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BETAS = (0.9, 0.999)  # what run_clm's AdamW has, which has no option for them
WEIGHT_DECAY = 0.1
# Without a warm-up: at more, the loss of the wider models first rises.
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Setting:
    """What every program is told.

    Attributes:
        start_dir: an HF model, a tokenizer of as many ids, and nanoGPT's checkpoint where that is measured.
        model_type: of the model, as in its config.json.
        data_dir: `train.bin`, uint16 ids.
        block_size: targets of a block.
        micro_batch: blocks of an update.
        num_updates: that there are blocks for; then they begin again.
        device: `cpu` or `cuda`.
        nanogpt_dir: nanoGPT's folder; None where it is not measured.
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
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Setting:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text()))

    def ids(self) -> NDArray[np.uint16]:
        """All of them."""
        return np.fromfile(Path(self.data_dir, "train.bin"), np.uint16)

    def blocks(self) -> Iterator[NDArray[np.int64]]:
        """Each int64 [block_size + 1]; a block's last target is the next one's first input."""
        ids = self.ids().astype(np.int64)
        for start in range(0, self.num_updates * self.micro_batch * self.block_size, self.block_size):
            yield ids[start : start + self.block_size + 1]
