"""Checkpoints: complete `from_pretrained` folders with everything that the next update depends on.

A checkpoint is written into a temporary folder, its manifest (sizes and hashes) last, and gets its name by one rename:
it is finished or does not exist. It consists of safetensors and JSON files; nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm.config.errors import UserError
from llm.files.atomic import atomic_folder
from llm.files.manifest import MANIFEST, find_damage, write_manifest
from llm.models.tied_weights import with_tied_names
from llm.training.checkpoints.external import ExternalCheckpoint, open_external
from llm.training.checkpoints.layout import (
    ABANDONED,
    OPTIMIZER,
    STATE,
    VERSION,
    eval_loss,
    external_optimizer,
    is_external,
    read_state,
    reasons_and_loss,
    saved_steps,
    unmanaged_paths,
)

log = logging.getLogger(__name__)

# The reasons for a save decide how long the checkpoint is kept. --save_total_limit counts the regular ones; of the
# rolling ones the newest _NUM_ROLLING are kept.
_REGULAR = frozenset({"regular", "end"})
_ROLLING = frozenset({"timed", "asked", "stop"})
_NUM_ROLLING = 2
_NUM_LISTED = 5


class NotFiniteError(UserError):
    """A weight is nan or inf; the checkpoint is not written, because a resume would take it for the newest good one."""


class CheckpointReader:
    """The updater's state in a checkpoint, read a tensor or a slice at a time.

    Attributes:
        numbers: what the updater saved as JSON.
        shapes: shape of every saved tensor by name.
    """

    def __init__(self, path: Path, numbers: dict[str, Any]) -> None:
        self.numbers = numbers
        open_file: Any = safe_open  # safetensors has no types
        self._file = open_file(path, framework="pt")
        names: list[str] = list(self._file.keys())
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(self._file.get_slice(name).get_shape()) for name in names
        }

    def read(self, name: str, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """Return a tensor in the saved dtype on the CPU, or its slice with this offset and shape; see `StateReader`."""
        if offset is None or shape is None or not self.shapes[name]:
            tensor: Tensor = self._file.get_tensor(name)
            return tensor
        region = tuple(slice(first, first + length) for first, length in zip(offset, shape, strict=True))
        part: Tensor = self._file.get_slice(name)[region]
        return part


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk.

    Attributes:
        path: its folder, which `from_pretrained` loads.
        step: finished updates.
        state: content of training_state.json: `progress`, `plan`, `identity`, `updater`, `mixed_precision`, `reasons`,
            `world`, `step`, `version`.
    """

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def eval_loss(self) -> float:
        """Evaluation loss of exactly these weights, in nats a token; inf if they were not evaluated."""
        return eval_loss(self.state)

    def updater_state(self) -> CheckpointReader:
        """Open the updater's state.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            return CheckpointReader(self.path / OPTIMIZER, self.state["updater"])
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path / OPTIMIZER} cannot be read ({error})") from error


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write `folder/step_N`, and return its path when it is durable.

    Args:
        folder: the run's `checkpoints/`.
        step: finished updates.
        model: its class and configuration are used, not its weights, which a later update may have changed.
        tokenizer: saved in the same folder.
        weights: the model's weights at that step, any shape and dtype, on the CPU, each at least under its first name.
        tensors: the updater's tensors by name, any shape and dtype, on the CPU.
        state: everything else, as values that JSON holds.

    Raises:
        NotFiniteError: a weight is nan or inf; nothing is written.
        UserError: the disk is full or the folder cannot be written; older checkpoints are unchanged.
    """
    path = folder / f"step_{step}"
    bad = [name for name, tensor in weights.items() if tensor.is_floating_point() and not _is_finite(tensor)]
    if bad:
        raise NotFiniteError(f"step {step} is not saved: {bad[0]} is not finite; the older checkpoints are kept")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_folder(path) as temporary:
            model.save_pretrained(temporary, state_dict=with_tied_names(model, weights))
            tokenizer.save_pretrained(temporary)
            save_file(dict(tensors), temporary / OPTIMIZER)
            facts = {"version": VERSION, "step": step, **state}
            (temporary / STATE).write_text(json.dumps(facts, indent=1) + "\n")
            write_manifest(temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {path} cannot be written ({error}); make room; the older checkpoints are complete"
        ) from error
    return path


def _is_finite(tensor: Tensor) -> bool:
    # nan and inf show in the minimum and maximum, which need no second tensor of this size in memory.
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def abandon_newer(folder: Path, step: int) -> None:
    """Move the checkpoints of later updates than `step` into `folder/abandoned`: the run continues from `step`.

    If they stayed, a resume and `superseded` would take them for newer than the checkpoints of this start. The log
    names what else is in the folder, damaged or not this run's: no run removes it.

    Args:
        folder: the run's `checkpoints/`.
        step: the update that this start continues from.
    """
    for later_step, path in saved_steps(folder):
        if later_step > step:
            destination = folder / ABANDONED / path.name
            destination.parent.mkdir(exist_ok=True)
            replaced = ", replacing an earlier one" if destination.exists() else ""
            shutil.rmtree(destination, ignore_errors=True)
            path.rename(destination)
            log.warning(
                "checkpoint %s is later than step %d, from which this run continues: moved to %s%s",
                path.name,
                step,
                destination,
                replaced,
            )
    unmanaged = unmanaged_paths(folder)
    if unmanaged:
        names = ", ".join(path.name for path in unmanaged[:_NUM_LISTED])
        more = ", ..." if len(unmanaged) > _NUM_LISTED else ""
        log.info("in %s, damaged or not this run's, and removed by no run: %s%s", folder, names, more)


def superseded(folder: Path, limit: int | None) -> list[Path]:
    """Return the checkpoints that can be removed, oldest first.

    Kept are: the newest checkpoint; of the regular saves (`--checkpointing_steps`, and the run's end) the newest
    `limit`, or all; of the others (by the clock, on request, at a stop) the newest two; and the one with the
    lowest evaluation loss. Unreadable checkpoints and those of other programs are never returned.

    Args:
        folder: the run's `checkpoints/`.
        limit: number of regular checkpoints to keep; None keeps all.
    """
    checkpoints = [(path, *facts) for _, path in saved_steps(folder) if (facts := reasons_and_loss(path)) is not None]
    regular = [path for path, reasons, _ in checkpoints if reasons & _REGULAR]
    rolling = [path for path, reasons, _ in checkpoints if reasons & _ROLLING and not reasons & _REGULAR]
    evaluated = [(loss, path) for path, _, loss in checkpoints if math.isfinite(loss)]
    kept = {path for path, *_ in checkpoints[-1:]}
    kept.update(regular if limit is None else regular[-limit:])
    kept.update(rolling[-_NUM_ROLLING:])
    if evaluated:
        kept.add(min(evaluated)[1])
    return [path for path, *_ in checkpoints if path not in kept]


def remove(path: Path) -> None:
    """Remove a checkpoint; rename it first, so that a kill in between leaves no incomplete one under its name."""
    hidden = path.with_name(f".{path.name}.gone")
    path.rename(hidden)
    shutil.rmtree(hidden)


def find_checkpoint(requested: bool | str, folder: Path | None) -> Checkpoint | ExternalCheckpoint | None:
    """Return the checkpoint that `--resume_from_checkpoint` names.

    Args:
        requested: False: none. True (the bare flag): the newest good checkpoint in `folder`, or None if nothing was
            saved yet; the log names newer ones that are damaged. `latest` or `best`: that checkpoint in `folder`, which
            must exist. Anything else: a path.
        folder: the run's `checkpoints/`; None where nothing is kept.

    Raises:
        UserError: the requested checkpoint is missing or damaged.
    """
    if requested is False:
        return None
    if requested is not True and requested not in ("latest", "best"):
        return open_checkpoint(Path(str(requested)).expanduser())
    if folder is None:
        if requested is True:
            return None
        raise UserError(f"--resume_from_checkpoint {requested} needs --output_dir, which was not given")
    good = _good_checkpoints(folder, newest_only=requested != "best")
    if requested == "best":
        evaluated = [checkpoint for checkpoint in good if math.isfinite(checkpoint.eval_loss)]
        good = sorted(evaluated, key=lambda checkpoint: checkpoint.eval_loss)
    if not good and requested is not True:
        raise UserError(f"--resume_from_checkpoint {requested}: there is no such checkpoint in {folder}")
    if not good and saved_steps(folder):
        # A fresh run would remove the damaged ones, and with them what could still be recovered.
        raise UserError(
            f"--resume_from_checkpoint: none of the checkpoints in {folder} is good; name another one, or "
            "start from scratch with --overwrite_output_dir and without --resume_from_checkpoint"
        )
    return good[0] if good else None


def open_checkpoint(path: Path) -> Checkpoint | ExternalCheckpoint:
    """Open the checkpoint in the folder `path`, and verify the hash of every file.

    Another program's checkpoint has no hashes: that its files can be read is all that is checked.

    Raises:
        UserError: the folder is not a checkpoint, or it is damaged.
    """
    if is_external(path):
        return open_external(path)
    if not (path / STATE).is_file() and not (path / MANIFEST).is_file():
        raise UserError(
            f"--resume_from_checkpoint {path} is not a checkpoint: it has no {STATE}; "
            "name a folder like OUTPUT_DIR/checkpoints/step_100"
        )
    problem = find_damage(path)
    if problem is not None:
        raise UserError(f"checkpoint {path} is damaged: {problem}; resume from another one")
    state = read_state(path)
    if state.get("version") != VERSION:
        raise UserError(f"checkpoint {path} has version {state.get('version')}; this program reads {VERSION}")
    return Checkpoint(path=path, step=int(state["step"]), state=state)


def _good_checkpoints(folder: Path, *, newest_only: bool) -> list[Checkpoint | ExternalCheckpoint]:
    """Return the good checkpoints, newest first."""
    good: list[Checkpoint | ExternalCheckpoint] = []
    for _, path in reversed(saved_steps(folder)):
        try:
            if is_external(path) and external_optimizer(path) is None:
                # A run that was killed while it removed its own checkpoint may leave such a folder.
                raise UserError(f"checkpoint {path} is incomplete")
            good.append(open_checkpoint(path))
        except UserError as error:
            log.warning("%s; taking an older one", error)
            continue
        if newest_only:
            break
    return good
