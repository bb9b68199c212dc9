"""Checkpoints of other programs: accelerate's `save_state` (run_clm_no_trainer, llm-pytorch), and HF's Trainer.

Such a checkpoint holds weights, and an optimizer's state as a pickle. Only this module unpickles anything, with a
reader that accepts tensors and plain values alone, so that no file can run code.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from llm.config.errors import UserError
from llm.config.options import ModelOptions
from llm.optim.groups import parameter_groups
from llm.optim.registry import OPTIMIZERS
from llm.training.checkpoints.layout import external_optimizer
from llm.training.updaters.base import LoadedState, Updater

log = logging.getLogger(__name__)

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Folders with the weights of DeepSpeed and FSDP.
_SHARDED = ("pytorch_model", "pytorch_model_fsdp*")
_SCALER = "scaler.pt"
# Files that are listed in the log as not read.
_UNREAD = (
    "random_states_*.pkl",
    "rng_state*.pth",
    "sampler*.bin",
    "dl_state_dict*.bin",
    "scheduler.*",
    "kfac.pt",
    "custom_checkpoint_*.pkl",
    "trainer_state.json",
    "training_args.bin",
)
# Parts of the names of parameters without weight decay. Source: run_clm_no_trainer.py of transformers, before and since
# version 4.26; llm-pytorch has the latter.
_UNDECAYED = (("bias", "layer_norm.weight"), ("bias", "LayerNorm.weight"))
# The class of an optimizer, by the names of the tensors that it keeps for a parameter.
_CLASSES = {spec.external_state: spec.optimizer_class.__name__ for spec in OPTIMIZERS.values() if spec.external_state}
_DELETE_HINT = "delete the file to start with a new optimizer"


@dataclass(frozen=True)
class ExternalCheckpoint:
    """A checkpoint of another program: weights, and optionally an optimizer's state.

    Attributes:
        path: the checkpoint's folder.
        step: finished updates.
        weights: file of the weights; None if `from_pretrained` loads the folder.
        optimizer: file of the optimizer's state; None if there is none.
    """

    path: Path
    step: int
    weights: Path | None
    optimizer: Path | None

    @property
    def eval_loss(self) -> float:
        """Evaluation loss: always inf, because such a checkpoint holds none."""
        return math.inf

    def model_options(self, options: ModelOptions) -> ModelOptions:
        """Return the options that build the checkpoint's model.

        These are the run's own `options`, or, if `from_pretrained` loads the folder, options that name the folder.
        """
        if self.weights is not None:
            return options
        folder_options = {"model_name_or_path": str(self.path), "config_name": None, "config_overrides": None}
        return options.model_copy(update=folder_options)

    def load_weights(self, model: PreTrainedModel) -> None:
        """Copy the weights into the model, before anything wraps or shards it.

        This does nothing if `from_pretrained` has already loaded them because `model_options` named the folder.

        Raises:
            UserError: the weights belong to another model, or the file is damaged or refused.
        """
        if self.weights is not None:
            _load_weights(model, self.weights)

    def load(self, updater: Updater) -> None:
        """Load the optimizer's state into the updater, on all ranks, and log what the folder does not hold.

        Raises:
            UserError: the state belongs to another model, or a file is damaged or refused.
            ValueError: the state belongs to another optimizer.
        """
        restored = [f"weights ({self.weights.name if self.weights else self.path})"]
        if self.optimizer is not None:
            saved = _unpickle(self.optimizer)
            optimizer = _match_parameters(saved, updater.model.model, self.optimizer)
            current = updater.state()
            scaler = self.path / _SCALER
            has_scaler = current.numbers.get("scaler") is not None and scaler.is_file()
            numbers = {"optimizer": optimizer.class_name, "scaler": _unpickle(scaler) if has_scaler else None}
            updater.load(LoadedState(optimizer.tensors, numbers))
            _log_differences(saved, optimizer.decayed, current.param_groups)
            restored.append(f"the state of {optimizer.class_name} ({self.optimizer.name})")
            if has_scaler:
                restored.append(f"the loss scale ({_SCALER})")
        self._log_contents(restored)

    def _log_contents(self, restored: list[str]) -> None:
        log.info(
            "resumed from step %d (%s), which another program wrote: %s", self.step, self.path, " and ".join(restored)
        )
        if self.optimizer is None:
            log.warning("%s holds no optimizer state: the optimizer starts from scratch", self.path.name)
        log.info(
            "not restored: data position (continuing at step %d of this run's own order; some samples of this epoch "
            "repeat, some are skipped), the seed, and the tokens and seconds so far (counted from here)",
            self.step,
        )
        unread = sorted(
            path.name for path in self.path.iterdir() if any(fnmatch(path.name, pattern) for pattern in _UNREAD)
        )
        log.info(
            "not read: %s; learning rate and dropout of an update follow from its number and this run's options",
            ", ".join(unread) or "nothing",
        )


def open_external(path: Path) -> ExternalCheckpoint:
    """Find the files of another program's checkpoint, and check that each can be read.

    Args:
        path: a folder named `step_N` or `checkpoint-N`, made after N updates, or `epoch_N`.

    Raises:
        UserError: the weights are missing or sharded, or a file is damaged or refused.
    """
    weights = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    if (path / _CONFIG).is_file():
        weights = None
    elif weights is None:
        sharded = any(fnmatch(entry.name, pattern) for entry in path.iterdir() for pattern in _SHARDED)
        problem = "in shards, which cannot be read; merge them" if sharded else f"missing (no {_WEIGHTS[0]})"
        raise UserError(f"--resume_from_checkpoint {path}: the weights are {problem}")
    elif weights.suffix == ".safetensors":
        _require_readable(weights)
    optimizer = external_optimizer(path)
    num_updates = None if optimizer is None else _num_updates(_unpickle(optimizer), optimizer)
    step = int(path.name.replace("-", "_").rpartition("_")[2])
    if path.name.startswith("epoch_"):
        if num_updates is None:
            raise UserError(
                f"--resume_from_checkpoint {path} does not hold its number of updates; rename the folder to step_N"
            )
        step = num_updates
    return ExternalCheckpoint(path, step, weights, optimizer)


def _require_readable(path: Path) -> None:
    """Read the header of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); resume from another checkpoint") from error


def _unpickle(path: Path) -> dict[str, Any]:
    """Return the content of a file that `torch.save` wrote, if it consists of tensors and plain values.

    Raises:
        UserError: the file is damaged or holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # Unpickling a bad file raises errors of many types.
    except Exception as error:
        raise UserError(
            f"{path} is refused: it is damaged, or holds objects other than tensors and plain values, which could run "
            "code"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is refused: it is not a dictionary")
    return content


def _load_weights(model: PreTrainedModel, path: Path) -> None:
    """Copy the weights in a file into the model, without the name prefixes that wrappers add."""
    try:
        saved = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); resume from another checkpoint") from error
    weights = {_unwrapped(name): tensor for name, tensor in saved.items()}
    expected = model.state_dict()
    for name, tensor in weights.items():
        if name in expected and expected[name].shape != tensor.shape:
            raise _other_model(path, f"{name} is {list(tensor.shape)}, expected {list(expected[name].shape)}")
    unknown = [name for name, tensor in weights.items() if name not in expected and not _is_constant(name, tensor)]
    if unknown:
        raise _other_model(path, f"{unknown[0]} is unexpected")
    # A tied weight is saved under one of its names.
    loaded = {expected[name].data_ptr() for name in weights if name in expected}
    missing = [name for name, tensor in expected.items() if name not in weights and tensor.data_ptr() not in loaded]
    if missing:
        raise _other_model(path, f"{missing[0]} is missing")
    model.load_state_dict(weights, strict=False)


def _unwrapped(name: str) -> str:
    """Return a weight's name without the prefixes of DDP and torch.compile."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _is_constant(name: str, tensor: Tensor) -> bool:
    """Return whether this is a mask or a frequency: older versions of transformers saved them, newer ones do not."""
    return not tensor.is_floating_point() or tensor.ndim == 0 or name.endswith("inv_freq")


def _other_model(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} holds another model than this run's ({reason}); use the --model_name_or_path, or the --config_name, "
        "--config_overrides and --tokenizer_name, that the checkpoint was made with"
    )


def _num_updates(saved: Mapping[str, Any], path: Path) -> int | None:
    """Return the number of updates that the optimizer made; None if it does not count them."""
    try:
        return max((int(state["step"]) for state in saved["state"].values() if "step" in state), default=None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is refused: it holds no optimizer state") from error


class _OptimizerState(NamedTuple):
    """An optimizer's state, by the names of this run's parameters.

    Attributes:
        tensors: fp32 tensors by `<parameter>/<key>`.
        class_name: class of the optimizer.
        decayed: parameters with weight decay.
    """

    tensors: dict[str, Tensor]
    class_name: str
    decayed: set[str]


def _match_parameters(saved: Mapping[str, Any], model: PreTrainedModel, path: Path) -> _OptimizerState:
    """Return the saved optimizer's state under the names of the model's parameters.

    The optimizer numbers parameters in the order of its groups, which differs between programs. The order is the first
    one of `_parameter_orders` with groups of these sizes and parameters of these shapes.

    Raises:
        UserError: the file holds no state of a supported optimizer, or that of another model.
    """
    try:
        groups = [group for group in saved["param_groups"] if group["params"]]
        numbers = [list(group["params"]) for group in groups]
        decays = [bool(group.get("weight_decay")) for group in groups]
        # A momentum that does not exist yet is None.
        states = {
            number: {key: torch.as_tensor(value) for key, value in state.items() if value is not None}
            for number, state in saved["state"].items()
        }
        keys = frozenset(key for state in states.values() for key in state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is refused: it holds no optimizer state; {_DELETE_HINT}") from error
    class_name = _CLASSES.get(keys)
    if class_name is None:
        kept = ", ".join(sorted(map(str, keys))) or "nothing"
        raise UserError(
            f"{path} holds {kept}: this is not the state of {' or '.join(_CLASSES.values())}; {_DELETE_HINT}"
        )
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for order in _parameter_orders(model):
        if [len(group) for group in numbers] != [len(group) for group in order]:
            continue
        names = dict(zip(chain(*numbers), chain(*order), strict=True))
        if all(
            tensor.ndim == 0 or tensor.shape == shapes[names[number]]
            for number, state in states.items()
            for tensor in state.values()
        ):
            tensors = {
                f"{names[number]}/{key}": tensor.float()
                for number, state in states.items()
                for key, tensor in state.items()
            }
            decayed = chain(*(group for group, has_decay in zip(order, decays, strict=True) if has_decay))
            return _OptimizerState(tensors, class_name, set(decayed))
    raise UserError(f"{path} does not fit the parameters of this run's model; {_DELETE_HINT}")


def _parameter_orders(model: PreTrainedModel) -> Iterator[list[list[str]]]:
    """Yield the names of the model's parameters in the optimizer groups that other programs make of them."""
    names = [name for name, _ in model.named_parameters()]
    for marks in _UNDECAYED:
        undecayed = [name for name in names if any(mark in name for mark in marks)]
        decayed = [name for name in names if name not in set(undecayed)]
        yield [group for group in (decayed, undecayed) if group]
    # The Trainer makes the same groups as this package.
    yield [[name for name, _ in group["params"]] for group in parameter_groups(model, 0.0)]
    yield [names]


def _log_differences(saved: Mapping[str, Any], decayed: set[str], param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn about optimizer settings that this run's options change, and weights that decay in one of the two only.

    Args:
        saved: the optimizer's state dictionary in the checkpoint.
        decayed: parameters with weight decay in the checkpoint.
        param_groups: settings of this run's optimizer.
    """
    if not param_groups:  # the updater has no settings of this kind
        return
    decayed_here = {name for group in param_groups if group["weight_decay"] for name in group["param_names"]}
    if decayed and decayed_here:
        _log_decay_change(decayed - decayed_here, "no longer decayed")
        _log_decay_change(decayed_here - decayed, "decayed from now on")
    saved_settings = saved["param_groups"][0]
    settings = param_groups[0]
    for key in ("initial_lr", "betas", "eps", "momentum", "weight_decay"):
        if key in saved_settings and key in settings and saved_settings[key] != settings[key]:
            log.warning(
                "the checkpoint's optimizer had %s %s, this run has %s", key, saved_settings[key], settings[key]
            )


def _log_decay_change(names: set[str], change: str) -> None:
    if names:
        log.warning("weight decay differs: %s and %d other weights are %s", min(names), len(names) - 1, change)
