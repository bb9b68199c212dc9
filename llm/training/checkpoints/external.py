"""Checkpoints that accelerate's `save_state` wrote, as run_clm_no_trainer and llm-pytorch call it, or HF's Trainer.

They hold weights and an optimizer's state, the latter pickled: it is read by a reader that knows tensors and
plain values only, so that no file can run as a program. This is the one place that unpickles anything.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

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
_SHARDED = ("pytorch_model", "pytorch_model_fsdp*")  # of DeepSpeed and FSDP
_SCALER = "scaler.pt"
_UNREAD = (
    *("random_states_*.pkl", "rng_state*.pth", "sampler*.bin", "dl_state_dict*.bin", "scheduler.*", "kfac.pt"),
    *("custom_checkpoint_*.pkl", "trainer_state.json", "training_args.bin"),
)
# Names in the group without decay. Source: run_clm_no_trainer.py of transformers, before and since 4.26;
# llm-pytorch has the latter.
_UNDECAYED = (("bias", "layer_norm.weight"), ("bias", "LayerNorm.weight"))
# The class of an optimizer, by the names of the tensors that it keeps for a parameter.
_CLASSES = {spec.external_state: spec.optimizer_class.__name__ for spec in OPTIMIZERS.values() if spec.external_state}
_START_ANEW = "take the file away to start with a new optimizer"


@dataclass(frozen=True)
class ExternalCheckpoint:
    """A checkpoint of another program: weights, and perhaps an optimizer.

    Attributes:
        path: its folder.
        step: finished updates.
        weights: the model's file; None in a folder that `from_pretrained` loads.
        optimizer: the optimizer's file; None when there is none.
    """

    path: Path
    step: int
    weights: Path | None
    optimizer: Path | None

    @property
    def eval_loss(self) -> float:
        """Inf: it does not hold one."""
        return math.inf

    def model_options(self, options: ModelOptions) -> ModelOptions:
        """The options that build its model: those given, or the folder itself, where `from_pretrained` loads it."""
        if self.weights is not None:
            return options
        named = {"model_name_or_path": str(self.path), "config_name": None, "config_overrides": None}
        return options.model_copy(update=named)

    def load_weights(self, model: PreTrainedModel) -> None:
        """Copy the weights into the model, before anything wraps or shards it.

        Does nothing where `model_options` has already named the folder, which `from_pretrained` loads.

        Raises:
            UserError: the weights belong to another model, or the file is damaged or refused.
        """
        if self.weights is not None:
            _load_weights(model, self.weights)

    def load(self, updater: Updater) -> None:
        """Load the optimizer's state into the updater, on all ranks, and log what the folder does not hold.

        Raises:
            UserError: the state belongs to another model, or a file is damaged or refused.
            ValueError: it belongs to another optimizer.
        """
        restored = [f"weights ({self.weights.name if self.weights else self.path})"]
        if self.optimizer is not None:
            saved = _unpickled(self.optimizer)
            tensors, name, decayed = _by_parameter(saved, updater.model.model, self.optimizer)
            current = updater.state()
            scaler = self.path / _SCALER
            has_scaler = current.numbers.get("scaler") is not None and scaler.is_file()
            numbers = {"optimizer": name, "scaler": _unpickled(scaler) if has_scaler else None}
            updater.load(LoadedState(tensors, numbers))
            _log_differences(saved, decayed, current.param_groups)
            restored.append(f"the state of {name} ({self.optimizer.name})")
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
            "not read: %s; the learning rate and dropout of an update follow from its number and this run's options",
            ", ".join(unread) or "nothing",
        )


def open_external(path: Path) -> ExternalCheckpoint:
    """Finds the parts of another program's checkpoint, and that each can be read.

    Args:
        path: a folder `step_N` or `checkpoint-N` after N updates, or `epoch_N`.

    Raises:
        UserError: the weights are not there, or sharded, or a file is damaged or refused.
    """
    weights = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    if (path / _CONFIG).is_file():
        weights = None
    elif weights is None:
        sharded = any(fnmatch(entry.name, pattern) for entry in path.iterdir() for pattern in _SHARDED)
        what = "in shards, which are not read here; join them" if sharded else f"not there (no {_WEIGHTS[0]})"
        raise UserError(f"--resume_from_checkpoint {path}: the weights are {what}")
    elif weights.suffix == ".safetensors":
        _read_names(weights)
    optimizer = external_optimizer(path)
    num_updates = None if optimizer is None else _num_updates(_unpickled(optimizer), optimizer)
    step = int(path.name.replace("-", "_").rpartition("_")[2])
    if path.name.startswith("epoch_"):
        if num_updates is None:
            raise UserError(f"--resume_from_checkpoint {path} does not say after how many updates it was made")
        step = num_updates
    return ExternalCheckpoint(path, step, weights, optimizer)


def _read_names(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); resume from another checkpoint") from error


def _unpickled(path: Path) -> dict[str, Any]:
    """What a file of torch holds, if that is tensors and plain values.

    Raises:
        UserError: it is not.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # Unpickling raises many types, all of them the file's fault.
    except Exception as error:
        raise UserError(
            f"{path} is refused: it is damaged, or holds more than tensors and plain values, which could run as a "
            "program"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is refused: it holds no table of names and values")
    return content


def _load_weights(model: PreTrainedModel, path: Path) -> None:
    """Copies the weights into the model, under whatever wrappers' names they were saved."""
    try:
        saved = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); resume from another checkpoint") from error
    found = {_unwrapped(name): tensor for name, tensor in saved.items()}
    own = model.state_dict()
    for name, tensor in found.items():
        if name in own and own[name].shape != tensor.shape:
            raise _of_another_model(path, f"{name} is {list(tensor.shape)} and would be {list(own[name].shape)}")
    unknown = [name for name, tensor in found.items() if name not in own and not _is_constant(name, tensor)]
    # A tied weight is saved under one of its names.
    places = {own[name].data_ptr() for name in found if name in own}
    missing = [name for name, tensor in own.items() if name not in found and tensor.data_ptr() not in places]
    if unknown or missing:
        raise _of_another_model(path, f"{unknown[0]} is too much" if unknown else f"{missing[0]} is missing")
    model.load_state_dict(found, strict=False)


def _unwrapped(name: str) -> str:
    """A weight's name without those of DDP and compile."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _is_constant(name: str, tensor: Tensor) -> bool:
    """Whether this is a mask or a frequency, which older versions of transformers saved and newer ones compute."""
    return not tensor.is_floating_point() or tensor.ndim == 0 or name.endswith("inv_freq")


def _of_another_model(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} holds another model than this run's ({reason}): give the --model_name_or_path, or the --config_name, "
        "--config_overrides and --tokenizer_name, that it was made with"
    )


def _num_updates(saved: Mapping[str, Any], path: Path) -> int | None:
    """Updates that the optimizer made, if it counts them."""
    try:
        return max((int(state["step"]) for state in saved["state"].values() if "step" in state), default=None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is refused: it holds no optimizer's state") from error


def _by_parameter(
    saved: Mapping[str, Any], model: PreTrainedModel, path: Path
) -> tuple[dict[str, Tensor], str, set[str]]:
    """The optimizer's tensors by `<parameter>/<what>`, its class, and the parameters that it decays.

    It numbers parameters in the order of its groups, which is not ours; the order is the one of those in use
    that has groups of these sizes and tensors of these shapes.
    """
    try:
        groups = [list(group["params"]) for group in saved["param_groups"] if group["params"]]
        decays = [bool(group.get("weight_decay")) for group in saved["param_groups"] if group["params"]]
        # A momentum that is not there yet is None.
        states = {
            number: {key: torch.as_tensor(value) for key, value in state.items() if value is not None}
            for number, state in saved["state"].items()
        }
        keys = frozenset(key for state in states.values() for key in state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is refused: it holds no optimizer's state; {_START_ANEW}") from error
    name = _CLASSES.get(keys)
    if name is None:
        kept = ", ".join(sorted(map(str, keys))) or "nothing"
        raise UserError(
            f"{path} holds {kept}: this is not the state of {' or '.join(_CLASSES.values())}; {_START_ANEW}"
        )
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for order in _orders(model):
        if [len(group) for group in groups] != [len(group) for group in order]:
            continue
        names = dict(zip(chain(*groups), chain(*order), strict=True))
        tensors = {f"{names[i]}/{key}": t.float() for i, state in states.items() for key, t in state.items()}
        if all(not t.ndim or t.shape == shapes[place.rpartition("/")[0]] for place, t in tensors.items()):
            return tensors, name, set(chain(*(names for names, is_so in zip(order, decays, strict=True) if is_so)))
    raise UserError(f"{path} does not fit the parameters of this run's model; {_START_ANEW}")


def _orders(model: PreTrainedModel) -> Iterator[list[list[str]]]:
    """The names of the parameters in the groups that others make of them."""
    names = [name for name, _ in model.named_parameters()]
    for marks in _UNDECAYED:
        undecayed = [name for name in names if any(mark in name for mark in marks)]
        yield [group for group in ([name for name in names if name not in set(undecayed)], undecayed) if group]
    # The Trainer's groups are ours.
    yield [[name for name, _ in group["params"]] for group in parameter_groups(model, 0.0)]
    yield [names]


def _log_differences(saved: Mapping[str, Any], decayed: set[str], param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn about settings of the optimizer that this run's options change, and about weights that decay in one only."""
    decays = {name for group in param_groups if group["weight_decay"] for name in group["param_names"]}
    if decayed and decays:
        for names, change in ((decayed - decays, "did, and do not here"), (decays - decayed, "did not, and do here")):
            if names:
                log.warning("weights that decayed otherwise: %s and %d others %s", min(names), len(names) - 1, change)
    then = saved["param_groups"][0]
    now = param_groups[0]
    for key in ("initial_lr", "betas", "eps", "momentum", "weight_decay"):
        if key in then and key in now and then[key] != now[key]:
            log.warning("its optimizer had %s %s, this run has %s", key, then[key], now[key])
