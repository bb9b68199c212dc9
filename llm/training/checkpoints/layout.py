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

from llm.files.manifest import MANIFEST

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


def reasons_and_loss(path: Path) -> tuple[frozenset[str], float] | None:
    """Why a checkpoint was saved, and its `eval_loss`; None of another program's, or one that is too damaged to say."""
    try:
        state = read_state(path)
        return frozenset(state["reasons"]), eval_loss(state)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def left_alone(folder: Path) -> list[Path]:
    """What lies in `checkpoints/` and is no checkpoint that a run could take or remove; its owner has to.

    These are damaged ones, those of other programs, and whatever else somebody put there; not what a killed start
    left half made, which the next one removes.
    """
    ours = {path for _, path in saved_steps(folder) if reasons_and_loss(path) is not None}
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if path not in ours and path.name != ABANDONED and not path.name.startswith(".")]


def is_external(path: Path) -> bool:
    """Whether another program wrote this folder: it is named like a checkpoint, and has none of the files of ours."""
    named = _FOREIGN_NAME.fullmatch(path.name) is not None and path.is_dir()
    return named and not any((path / name).exists() for name in (MANIFEST, STATE, OPTIMIZER))


def external_optimizer(path: Path) -> Path | None:
    """The optimizer's file of another program's checkpoint; its name is the surest sign of one."""
    return next((path / name for name in _FOREIGN_OPTIMIZERS if (path / name).is_file()), None)
