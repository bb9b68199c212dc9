"""Which files make a checkpoint, and what its small ones say; nothing here needs torch.

`checkpoints/step_N/` holds the model and tokenizer as transformers name them, and the files named here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.files.manifest import NAME as MANIFEST

VERSION = 1
STATE = "training_state.json"
OPTIMIZER = "optimizer.safetensors"
ABANDONED = "abandoned"

_NAME = re.compile(r"step_(\d+)")
# Of accelerate's `save_state` and transformers' Trainer.
_FOREIGN_NAME = re.compile(r"(?:step_|epoch_|checkpoint-)\d+")
_FOREIGN_OPTIMIZERS = ("optimizer.bin", "optimizer.pt")


def saved_steps(folder: Path) -> list[tuple[int, Path]]:
    """The finished checkpoints below `folder`, oldest first; temporary folders are none."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def read_state(path: Path) -> dict[str, Any]:
    """The training state of a checkpoint.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or no state.
    """
    state = json.loads((path / STATE).read_bytes())
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} holds no state")
    return state


def eval_loss(state: Mapping[str, Any]) -> float:
    """Nats a token of the evaluation of these very weights; inf if they were not evaluated."""
    progress = state["progress"]
    loss = progress["eval_loss"] if progress["eval_step"] == state["step"] else None
    return math.inf if loss is None or not math.isfinite(loss) else float(loss)


def is_foreign(path: Path) -> bool:
    """Whether another program wrote this folder: it is named like a checkpoint, and has none of the files of ours."""
    named = _FOREIGN_NAME.fullmatch(path.name) is not None and path.is_dir()
    return named and not any((path / name).exists() for name in (MANIFEST, STATE, OPTIMIZER))


def foreign_optimizer(path: Path) -> Path | None:
    """The optimizer's file of another program's checkpoint; its name is the surest sign of one."""
    return next((path / name for name in _FOREIGN_OPTIMIZERS if (path / name).is_file()), None)
