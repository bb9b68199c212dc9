"""Checkpoints: complete `from_pretrained` folders with everything that the next update depends on.

A checkpoint is written into a temporary folder, its manifest (sizes and hashes) last, and takes its name
by one rename, so that it is finished or does not exist. Safetensors and JSON only; nothing is pickled.
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
    left_alone,
    read_state,
    reasons_and_loss,
    saved_steps,
)

log = logging.getLogger(__name__)

# Why a checkpoint was saved decides how long it is kept: those that --save_total_limit counts, and those of
# which the newest few are.
_REGULAR = frozenset({"regular", "end"})
_ROLLING = frozenset({"timed", "asked", "stop"})
_NUM_ROLLING = 2
_NUM_NAMED = 5


class NotFiniteError(UserError):
    """The weights are not numbers any more: such a checkpoint would only be taken for the newest good one."""


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
        """Return a tensor, or a slice of it, in the saved dtype on the CPU; `StateReader.read` has the arguments."""
        if offset is None or shape is None or not self.shapes[name]:
            tensor: Tensor = self._file.get_tensor(name)
            return tensor
        region = tuple(slice(first, first + length) for first, length in zip(offset, shape, strict=True))
        part: Tensor = self._file.get_slice(name)[region]
        return part


@dataclass(frozen=True)
class Checkpoint:
    """A good checkpoint on disk.

    Attributes:
        path: its folder, which `from_pretrained` loads.
        step: finished updates.
        state: what `save` was given: `progress`, `plan`, `identity`, `updater`, `mixed_precision`, `reasons`,
            `world`.
    """

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def eval_loss(self) -> float:
        """Nats a token of the evaluation of these very weights; inf if they were not evaluated."""
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
    """Writes `folder/step_N`; returns when it is durable.

    Args:
        folder: the run's `checkpoints/`.
        step: finished updates.
        model: how transformers saves the weights; its own may have moved on since.
        tokenizer: saved beside it.
        weights: the model's at that step, of any shape and dtype, on the CPU, each at least under its first name.
        tensors: the updater's by name, of any shape and dtype, on the CPU.
        state: everything else, as JSON holds it.

    Raises:
        NotFiniteError: a weight is not a number; nothing is written.
        UserError: the disk is full or the folder cannot be written; older checkpoints are as they were.
    """
    path = folder / f"step_{step}"
    bad = [name for name, tensor in weights.items() if tensor.is_floating_point() and not _is_finite(tensor)]
    if bad:
        raise NotFiniteError(f"step {step} is not saved: {bad[0]} is not finite; the older checkpoints stay")
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
            f"checkpoint {path} cannot be written ({error}); make room: the older ones are whole"
        ) from error
    return path


def _is_finite(tensor: Tensor) -> bool:
    # The largest and the smallest say it without a second tensor in memory.
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def set_aside(folder: Path, step: int) -> None:
    """Moves what lies beyond update `step` into `folder/abandoned`: the run goes on from there, on a branch of its own.

    Left in place, they would be taken for newer than what this start saves, by a resume and by `superseded`. What
    stays, and is no checkpoint of ours or too damaged to be one, is named: no run removes it.
    """
    for beyond, path in saved_steps(folder):
        if beyond > step:
            aside = folder / ABANDONED / path.name
            aside.parent.mkdir(exist_ok=True)
            earlier = ", in the place of an earlier one, which is removed" if aside.exists() else ""
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            told = (path.name, step, aside, earlier)
            log.warning("checkpoint %s is beyond step %d, where this run goes on: moved to %s%s", *told)
    if others := left_alone(folder):
        names = ", ".join(path.name for path in others[:_NUM_NAMED]) + ", ..." * (len(others) > _NUM_NAMED)
        log.info("in %s, damaged or not this run's, and removed by no run: %s", folder, names)


def superseded(folder: Path, limit: int | None) -> list[Path]:
    """The checkpoints that nobody needs any more.

    Kept are: the newest one; of the regular saves (`--checkpointing_steps`, and the run's end) the newest
    `limit`, or all; of the others (by the clock, on request, at a stop) the newest two; and the one with the
    lowest evaluation loss. What cannot be read, or is another program's, is left for its owner to see.
    """
    found = [(path, *facts) for _, path in saved_steps(folder) if (facts := reasons_and_loss(path)) is not None]
    regular = [path for path, reasons, _ in found if reasons & _REGULAR]
    rolling = [path for path, reasons, _ in found if reasons & _ROLLING and not reasons & _REGULAR]
    measured = [(loss, path) for path, _, loss in found if math.isfinite(loss)]
    kept = {path for path, *_ in found[-1:]}
    kept |= set(regular if limit is None else regular[-limit:]) | set(rolling[-_NUM_ROLLING:])
    if measured:
        kept.add(min(measured)[1])
    return [path for path, *_ in found if path not in kept]


def remove(path: Path) -> None:
    """Removes a checkpoint, first its name: a kill in between leaves none that is half there."""
    gone = path.with_name(f".{path.name}.gone")
    path.rename(gone)
    shutil.rmtree(gone)


def find_checkpoint(asked: bool | str, folder: Path | None) -> Checkpoint | ExternalCheckpoint | None:
    """The checkpoint that `--resume_from_checkpoint` names.

    A bare flag takes the newest good one of the run's own folder, saying which newer ones are damaged; it
    is None when nothing was saved yet. `latest` and `best` insist on one; anything else is a path.

    Raises:
        UserError: what was insisted on is missing or damaged.
    """
    if asked is False:
        return None
    if asked is not True and asked not in ("latest", "best"):
        return open_checkpoint(Path(str(asked)).expanduser())
    if folder is None:
        if asked is True:
            return None
        raise UserError(f"--resume_from_checkpoint {asked} looks into --output_dir, and none was given")
    good = _good_ones(folder, all_of_them=asked == "best")
    if asked == "best":
        good = sorted((c for c in good if math.isfinite(c.eval_loss)), key=lambda c: c.eval_loss)
    if not good and asked is not True:
        raise UserError(f"--resume_from_checkpoint {asked}: there is no such checkpoint in {folder}")
    if not good and saved_steps(folder):
        # A fresh run would remove them, and what can still be saved of them.
        raise UserError(
            f"--resume_from_checkpoint: none of the checkpoints in {folder} is good; name another one, or "
            "begin anew with --overwrite_output_dir and without --resume_from_checkpoint"
        )
    return good[0] if good else None


def open_checkpoint(path: Path) -> Checkpoint | ExternalCheckpoint:
    """Verifies every byte of a checkpoint; of another program's, which has no hashes, that it can be read.

    Raises:
        UserError: it is none, or it is damaged.
    """
    if is_external(path):
        return open_external(path)
    if not (path / STATE).is_file() and not (path / MANIFEST).is_file():
        raise UserError(
            f"--resume_from_checkpoint {path} is no checkpoint: it has no {STATE}; "
            "name a folder like OUTPUT_DIR/checkpoints/step_100"
        )
    problem = find_damage(path)
    if problem is not None:
        raise UserError(f"checkpoint {path} is damaged: {problem}; resume from another one")
    state = read_state(path)
    if state.get("version") != VERSION:
        raise UserError(f"checkpoint {path} has version {state.get('version')}; this program reads {VERSION}")
    return Checkpoint(path=path, step=int(state["step"]), state=state)


def _good_ones(folder: Path, *, all_of_them: bool) -> list[Checkpoint | ExternalCheckpoint]:
    """Good checkpoints, newest first; only the newest one unless `all_of_them`."""
    good: list[Checkpoint | ExternalCheckpoint] = []
    for _, path in reversed(saved_steps(folder)):
        try:
            if is_external(path) and external_optimizer(path) is None:
                # What is left of one of ours, killed while it was removed, may look like this.
                raise UserError(f"checkpoint {path} is incomplete")
            good.append(open_checkpoint(path))
        except UserError as error:
            log.warning("%s; taking an older one", error)
            continue
        if not all_of_them:
            break
    return good
