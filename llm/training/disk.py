"""Is there room for what the run will save? Asked before the model is built."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PretrainedConfig

from llm.config.errors import UserError
from llm.config.options import KfacOptions
from llm.system.units import format_quantity
from llm.training.checkpoints.layout import saved_steps
from llm.training.estimates import count_numbers
from llm.training.updaters.preconditioning import kfac_bytes

# The newest checkpoint, the one before it, and one that is being written.
_NUM_CHECKPOINTS = 3
_BYTES_OF_A_NUMBER = 4


def require_room(checkpoints: Path, config: PretrainedConfig, optim: str, kfac: KfacOptions, *, is_fresh: bool) -> None:
    """Refuses a run whose checkpoints will not fit on the disk.

    What an earlier start of the run saved counts: it is rotated away. What an earlier run left is removed when a
    fresh one begins.

    Args:
        checkpoints: the run's `checkpoints/`, whose parent is there.
        config: of the model.
        optim: `--optim`.
        kfac: of K-FAC, which keeps more than most optimizers.
        is_fresh: whether nothing is continued.

    Raises:
        UserError: three checkpoints need more than is free, or K-FAC has nothing to take in the model.
    """
    one = sum(count_numbers(config, optim)) * _BYTES_OF_A_NUMBER + kfac_bytes(config, kfac)[1]
    present = [path for _, path in saved_steps(checkpoints)]
    free = shutil.disk_usage(checkpoints.parent).free
    number = _NUM_CHECKPOINTS
    if is_fresh:
        free += sum(file.stat().st_size for path in present for file in path.rglob("*") if file.is_file())
    else:
        number = max(1, number - len(present))
    if free < number * one:
        raise UserError(
            f"--output_dir {checkpoints.parent}: {number} checkpoints of {format_quantity(one)}B need "
            f"{format_quantity(number * one)}B, and {format_quantity(free)}B are free; make room, or choose another "
            "folder"
        )
