"""A causal language model: loaded with its weights, or built from scratch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from llm.config.errors import UsageError, UserError, first_line
from llm.config.options import ModelOptions
from llm.hub.names import name_error
from llm.models.config import context_limit, load_config, read_config

__all__ = ["build_model", "context_limit", "load_config", "read_config"]

log = logging.getLogger(__name__)


def build_model(
    options: ModelOptions, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, str]:
    """The model in float32 on the CPU, in training mode, and where its weights come from.

    Random weights are drawn from torch's global generator, which the caller seeds.

    Args:
        options: the model's options.
        config: what `load_config` gave.
        tokenizer: the tables of embeddings get its length; None leaves them as they are.

    Returns:
        The model, and ``loaded from X`` or ``random``.

    Raises:
        UserError: weights that are missing, broken or of other shapes; an attention that is not
            there.
    """
    source = options.model_name_or_path
    if source is None:
        model = _random(options, config)
        origin = "random"
    else:
        model = _loaded("--model_name_or_path", source, options, config)
        if tokenizer is not None:
            _fit_vocabulary(model, tokenizer)
        origin = f"loaded from {source}"
    if options.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(f"--gradient_checkpointing: {config.model_type} cannot do it; leave it out")
        _checkpoint_activations(model)
    model.train()
    return model, origin


def _checkpoint_activations(model: PreTrainedModel) -> None:
    # transformers 5.23 renamed the method and warns of the old name.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _random(options: ModelOptions, config: PretrainedConfig) -> PreTrainedModel:
    try:
        auto: Any = AutoModelForCausalLM
        model: PreTrainedModel = auto.from_config(
            config,
            dtype=torch.float32,
            trust_remote_code=options.trust_remote_code,
            **_attention(options),
        )
    except (ValueError, ImportError) as error:
        _raise_if_attention(options, error)
        raise UsageError(f"--config_overrides: {config.model_type} cannot be built: {first_line(error)}") from error
    return model


def _loaded(flag: str, source: str, options: ModelOptions, config: PretrainedConfig) -> PreTrainedModel:
    try:
        with _quiet():
            auto: Any = AutoModelForCausalLM
            model, report = auto.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                trust_remote_code=options.trust_remote_code,
                output_loading_info=True,
                # Mismatches are refused below, in one line that names them.
                ignore_mismatched_sizes=True,
                **_attention(options),
            )
    # Unpickling and the reading of weights raise many types, all of them the file's fault.
    except Exception as error:
        _raise_if_attention(options, error)
        raise _weights_error(flag, source, error) from error
    _require_whole(flag, source, report)
    loaded: PreTrainedModel = model
    return loaded


def _attention(options: ModelOptions) -> dict[str, str]:
    return {} if options.attn_implementation is None else {"attn_implementation": options.attn_implementation}


def _raise_if_attention(options: ModelOptions, error: Exception) -> None:
    """Raises the one-line form of an error that the choice of attention caused."""
    name = options.attn_implementation
    if name is None or isinstance(error, OSError):
        return
    if isinstance(error, ImportError) or "attn_implementation" in str(error) or "attention" in str(error).lower():
        raise UserError(
            f"--attn_implementation {name}: {first_line(error)} Use eager or sdpa, or leave it out"
        ) from error


def _require_whole(flag: str, source: str, report: dict[str, Any]) -> None:
    """Refuses weights of which some are missing; says which ones the model has no use for."""
    mismatched = sorted(entry[0] for entry in report["mismatched_keys"])
    missing = sorted(report["missing_keys"])
    if mismatched:
        raise UserError(f"{flag} {source}: weights of other shapes than the configuration says: {_named(mismatched)}")
    if missing:
        raise UserError(f"{flag} {source}: weights that the model needs are not there: {_named(missing)}")
    unused = sorted(report["unexpected_keys"])
    if unused:
        log.warning("weights of %s that this model has no use for are left out: %s", source, _named(unused))


def _named(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _weights_error(flag: str, source: str, error: Exception) -> UserError:
    folder = _folder_of(source)
    if folder is None:
        return name_error(flag, source, "model weights", error)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as broken:
            return UserError(f"{flag} {source}: {file} is damaged ({first_line(broken)}); copy or download it again")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return UserError(
            f"{flag} {source}: no weights in this folder (no model.safetensors); to start from "
            f"random ones use --config_name"
        )
    return UserError(f"{flag} {source}: the weights cannot be loaded: {first_line(error)}")


def _folder_of(source: str) -> Path | None:
    """The folder on disk of a folder's or a cached repository's files."""
    if Path(source).is_dir():
        return Path(source)
    try:
        cached = try_to_load_from_cache(source, "config.json")
    except ValueError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tables of embeddings the tokenizer's length."""
    table: Any = model.get_input_embeddings()
    rows: int = table.weight.shape[0]
    if rows != len(tokenizer):
        with _quiet():
            model.resize_token_embeddings(len(tokenizer))
        change = len(tokenizer) - rows
        what = f"{change} new rows" if change > 0 else f"{-change} rows without a token dropped"
        log.info("embeddings: %d rows became %d, as the tokenizer has (%s)", rows, len(tokenizer), what)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for settings in (model.config.get_text_config(decoder=True), model.generation_config):
        for name, i in ids.items():
            present = getattr(settings, name, None)
            if isinstance(present, int) and present >= len(tokenizer):
                setattr(settings, name, i)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and tables of the library; what matters in them is said in one line here."""
    library: Any = transformers_logging
    bars = library.is_progress_bar_enabled()
    level = library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
