"""The model that a run starts with: named by the options, or an object that the caller built."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm.config.errors import UserError, first_line
from llm.config.options import ModelOptions
from llm.distributed.world import World
from llm.models.build import build_model, fit_special_ids
from llm.models.config import is_same_vocabulary, load_config, read_config, set_dropout
from llm.models.tied_weights import first_names
from llm.training.build import log_weights
from llm.training.checkpoints.resume import Start
from llm.training.updaters.base import Updater


class InitialModel(Protocol):
    """Where the configuration and the first weights of a run come from; a resumed run has its checkpoint's weights."""

    def base_model(self, options: ModelOptions) -> str | None:
        """Return the Hub name, the folder or a description of the weights that are trained further; None: random."""

    def read_config(self, start: Start) -> PretrainedConfig:
        """Return the configuration before the tokenizer is known."""

    def load_config(self, start: Start, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
        """Return the configuration that the model is built with.

        Raises:
            UserError: the tokenizer does not fit the model.
        """

    def build(self, start: Start, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Build the model in float32 on the CPU; random weights are drawn from torch's global generator."""

    def receive(self, updater: Updater, world: World) -> None:
        """Take the trained weights from the updater, on all ranks together."""


class NamedModel:
    """The model that the options name; nothing of it stays in memory after the run."""

    def base_model(self, options: ModelOptions) -> str | None:
        """Return the name of pretrained weights."""
        return options.model_name_or_path

    def read_config(self, start: Start) -> PretrainedConfig:
        """Read one small file at most; see `llm.models.config.read_config`."""
        return read_config(start.model)

    def load_config(self, start: Start, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
        """Fit the configuration to the tokenizer if the model is built from scratch."""
        return load_config(start.model, tokenizer)

    def build(self, start: Start, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Load the weights, or draw random ones."""
        model, origin = build_model(start.model, config, tokenizer)
        log_weights(model, origin)
        return model

    def receive(self, updater: Updater, world: World) -> None:
        """Do nothing: the weights are in the run's folder."""


@dataclass(frozen=True)
class GivenModel:
    """A model that the caller built. A float32 copy is trained; `receive` writes the result into the caller's object.

    The copy keeps the hooks, kernels and wrappers of training away from the object, and the object's dtype and device
    away from training. If the run fails, the object is unchanged.

    Attributes:
        model: the caller's model, on any device and in any floating dtype.
        trust_remote_code: whether the model's own code may be run to load it.

    Raises:
        UserError: the run could not save the model as a folder that `AutoModelForCausalLM` loads.
    """

    model: PreTrainedModel
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _require_loadable(self.model, self.trust_remote_code)

    def base_model(self, options: ModelOptions) -> str | None:
        """Return the name that the model was loaded from, else a description."""
        return self.model.name_or_path or "a model built in Python"

    def read_config(self, start: Start) -> PretrainedConfig:
        """Return a copy of the model's configuration, with the dropout of the options."""
        config = copy.deepcopy(self.model.config)
        if start.model.dropout is not None:
            set_dropout(config, start.model.dropout)
        return config

    def load_config(self, start: Start, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
        """Return the same, after the check that the tokenizer's ids fit the embeddings, which are not resized."""
        embeddings: Any = self.model.get_input_embeddings()
        num_rows = int(embeddings.weight.shape[0])
        if len(tokenizer) > num_rows or not is_same_vocabulary(num_rows, len(tokenizer)):
            raise UserError(
                f"vocabulary mismatch: the given model has {num_rows} tokens, the tokenizer has {len(tokenizer)}; give "
                "the tokenizer of the model, or call model.resize_token_embeddings(len(tokenizer)) first"
            )
        return self.read_config(start)

    def build(self, start: Start, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Build a model with the given weights, or a checkpoint's; frozen parameters stay frozen.

        Raises:
            UserError: the checkpoint holds a model of other shapes.
        """
        model, origin = build_model(start.model, config, None)
        if start.model.model_name_or_path is None:
            model.load_state_dict(self.model.state_dict())
            model.generation_config = copy.deepcopy(self.model.generation_config)
            origin = "given"
        fit_special_ids(model, tokenizer)
        for name, parameter in self.model.named_parameters():
            model.get_parameter(name).requires_grad_(parameter.requires_grad)
        log_weights(model, origin)
        return model

    @torch.no_grad()
    def receive(self, updater: Updater, world: World) -> None:
        """Copy the weights into the caller's object, on every rank; its dtype and device stay."""
        own = self.model.state_dict()
        for name, tensor in updater.full_weights():
            if world.is_main:
                whole = tensor.to(world.device)
            else:
                whole = torch.empty(own[name].shape, dtype=tensor.dtype, device=world.device)
            own[name].copy_(world.broadcast_tensor(whole))


def _require_loadable(model: PreTrainedModel, trust_remote_code: bool) -> None:
    """Refuse a model that its configuration alone does not describe: the saved folder would not give it back."""
    name = type(model).__name__
    auto: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            expected = auto.from_config(copy.deepcopy(model.config), trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"model: AutoModelForCausalLM cannot load a {name} ({first_line(error)}); give a causal language model of "
            "transformers, or register yours with AutoModelForCausalLM.register"
        ) from error
    if type(model) is not type(expected):
        raise UserError(f"model: is a {name}, but AutoModelForCausalLM would load it as {type(expected).__name__}")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected_shapes = {name: tensor.shape for name, tensor in expected.state_dict().items()}
    changed = sorted(
        name for name in shapes | expected_shapes if shapes.get(name) != expected_shapes.get(name)
    ) or sorted(name for name, first in first_names(expected).items() if first_names(model)[name] != first)
    if changed:
        raise UserError(
            f"model: its weights are not those that its configuration describes ({changed[0]}, {len(changed)} in all); "
            "change the configuration too"
        )
