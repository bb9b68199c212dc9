"""Names of a checkpoint's files, and the facts in its small ones; this module does not import torch.

`checkpoints/step_N/` holds the model and the tokenizer under transformers' file names, and the files named here.
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
# Folders of accelerate's `save_state` and of transformers' Trainer.
_EXTERNAL_NAME = re.compile(r"(?:step_|epoch_|checkpoint-)\d+")
_EXTERNAL_OPTIMIZERS = ("optimizer.bin", "optimizer.pt")


def saved_steps(folder: Path) -> list[tuple[int, Path]]:
    """Return steps and folders of the finished checkpoints in `folder`, oldest first; temporary folders are skipped."""
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def read_state(path: Path) -> dict[str, Any]:
    """Read the training state of the checkpoint in the folder `path`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, or not a JSON object.
    """
    state = json.loads((path / STATE).read_bytes())
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} is not a JSON object")
    return state


def eval_loss(state: Mapping[str, Any]) -> float:
    """Return the evaluation loss of exactly these weights, in nats a token; inf if they were not evaluated."""
    progress = state["progress"]
    loss = progress["eval_loss"] if progress["eval_step"] == state["step"] else None
    return math.inf if loss is None or not math.isfinite(loss) else float(loss)


def reasons_and_loss(path: Path) -> tuple[frozenset[str], float] | None:
    """Return why a checkpoint was saved, and its `eval_loss`; None if it is another program's or too damaged."""
    try:
        state = read_state(path)
        return frozenset(state["reasons"]), eval_loss(state)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def unmanaged_paths(folder: Path) -> list[Path]:
    """Return what is in `checkpoints/` and no run uses or removes, by name: the user has to decide about it.

    These are damaged checkpoints, those of other programs, and all other files and folders, except the hidden
    temporary ones that a killed run left: the next start removes those.
    """
    managed = {path for _, path in saved_steps(folder) if reasons_and_loss(path) is not None}
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        path for path in entries if path not in managed and path.name != ABANDONED and not path.name.startswith(".")
    ]


def is_external(path: Path) -> bool:
    """Return whether another program wrote this folder: it has a checkpoint's name, but none of our own files."""
    has_name = _EXTERNAL_NAME.fullmatch(path.name) is not None and path.is_dir()
    return has_name and not any((path / name).exists() for name in (MANIFEST, STATE, OPTIMIZER))


def external_optimizer(path: Path) -> Path | None:
    """Return the optimizer's file in another program's checkpoint; None if there is none."""
    return next((path / name for name in _EXTERNAL_OPTIMIZERS if (path / name).is_file()), None)
