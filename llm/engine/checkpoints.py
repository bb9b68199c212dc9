"""Checkpoints: complete `from_pretrained` folders with everything that the next update depends on.

A checkpoint is written into a temporary folder, its manifest (sizes and hashes) last, and takes its name
by one rename, so that it is finished or does not exist. Safetensors and JSON only; nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm.config.errors import UserError
from llm.files.atomic import whole_folder
from llm.files.manifest import damage, write_manifest

log = logging.getLogger(__name__)

_VERSION = 1
_NAME = re.compile(r"step_(\d+)")
_STATE = "training_state.json"
_OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A good checkpoint on disk.

    Attributes:
        path: its folder, which `from_pretrained` loads.
        step: finished updates.
        state: what `save` was given: `progress`, `plan`, `identity`, `updater`.
    """

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's tensors, on the CPU.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            return load_file(self.path / _OPTIMIZER)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path / _OPTIMIZER} cannot be read ({error})") from error


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
) -> Path:
    """Writes `folder/step_N`; returns when it is durable.

    Args:
        folder: the run's `checkpoints/`.
        step: finished updates.
        model: saved as transformers saves it.
        tokenizer: saved beside it.
        tensors: the optimizer's, by name, on the CPU.
        state: everything else, as JSON holds it.

    Raises:
        UserError: the disk is full or the folder cannot be written; older checkpoints are as they were.
    """
    path = folder / f"step_{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, model, tokenizer, tensors, {"version": _VERSION, "step": step, **state})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {path} cannot be written ({error}); make room: the older ones are whole"
        ) from error
    return path


def _write(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
) -> None:
    with whole_folder(path) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_file(tensors, temporary / _OPTIMIZER)
        (temporary / _STATE).write_text(json.dumps(state, indent=1) + "\n")
        write_manifest(temporary)


def saved_steps(folder: Path) -> list[tuple[int, Path]]:
    """The finished checkpoints below `folder`, oldest first; temporary folders are none."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def set_aside(folder: Path, step: int) -> None:
    """Moves what lies beyond update `step` into `folder/abandoned`: the run goes on from there, on a branch of its own.

    Left in place, they would be taken for newer than what this start saves, by a resume and by `keep_newest`.
    """
    for beyond, path in saved_steps(folder):
        if beyond > step:
            aside = folder / "abandoned" / path.name
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("checkpoint %s is beyond step %d, where this run goes on: moved to %s", path.name, step, aside)


def keep_newest(folder: Path, limit: int | None) -> None:
    """Removes the oldest checkpoints beyond `limit`, except the one with the lowest evaluation loss."""
    if limit is None:
        return
    steps = [path for _, path in saved_steps(folder)]
    best = min(steps, key=_eval_loss, default=None)
    for path in steps[:-limit]:
        if path != best or not math.isfinite(_eval_loss(path)):
            shutil.rmtree(path)


def _eval_loss(path: Path) -> float:
    """Nats a token of the evaluation that a checkpoint remembers; inf without one."""
    try:
        loss = json.loads((path / _STATE).read_text())["progress"]["eval_loss"]
        return math.inf if loss is None or not math.isfinite(loss) else float(loss)
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def find_checkpoint(asked: bool | str, folder: Path | None) -> Checkpoint | None:
    """The checkpoint that `--resume_from_checkpoint` names.

    A bare flag takes the newest good one of the run's own folder, saying which newer ones are damaged; it
    is None when there is none. `latest` and `best` insist on one; anything else is a path.

    Raises:
        UserError: what was insisted on is missing or damaged.
    """
    if asked is False:
        return None
    if asked is not True and asked not in ("latest", "best"):
        return open_checkpoint(Path(str(asked)))
    if folder is None:
        if asked is True:
            return None
        raise UserError(f"--resume_from_checkpoint {asked} looks into --output_dir, and none was given")
    good = _good_ones(folder, all_of_them=asked == "best")
    if asked == "best":
        losses = {c.step: c.state["progress"]["eval_loss"] for c in good}
        measured = [c for c in good if losses[c.step] is not None and math.isfinite(losses[c.step])]
        good = sorted(measured, key=lambda c: float(losses[c.step]))
    if not good and asked is not True:
        raise UserError(f"--resume_from_checkpoint {asked}: there is no such checkpoint in {folder}")
    return good[0] if good else None


def open_checkpoint(path: Path) -> Checkpoint:
    """Verifies every byte of a checkpoint.

    Raises:
        UserError: it is none, or it is damaged.
    """
    if not (path / _STATE).is_file():
        raise UserError(
            f"--resume_from_checkpoint {path} is no checkpoint: it has no {_STATE}; "
            "name a folder like OUTPUT_DIR/checkpoints/step_100"
        )
    problem = damage(path)
    if problem is not None:
        raise UserError(f"checkpoint {path} is damaged: {problem}; resume from another one")
    state = json.loads((path / _STATE).read_text())
    if state.get("version") != _VERSION:
        raise UserError(f"checkpoint {path} has version {state.get('version')}; this program reads {_VERSION}")
    return Checkpoint(path=path, step=int(state["step"]), state=state)


def _good_ones(folder: Path, *, all_of_them: bool) -> list[Checkpoint]:
    """Good checkpoints, newest first; only the newest one unless `all_of_them`."""
    good: list[Checkpoint] = []
    for _, path in reversed(saved_steps(folder)):
        try:
            good.append(open_checkpoint(path))
        except UserError as error:
            log.warning("%s; taking an older one", error)
            continue
        if not all_of_them:
            break
    return good
