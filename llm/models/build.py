"""Build a causal language model: with weights that are loaded, or with random weights."""

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

log = logging.getLogger(__name__)


def build_model(
    options: ModelOptions, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, str]:
    """Build the model in float32 on the CPU, in training mode.

    Random weights are drawn from torch's global random generator, which the caller seeds.

    Args:
        options: options of the model.
        config: configuration of the model, the result of `load_config`.
        tokenizer: loaded embeddings are resized to its length; None: they keep their size.

    Returns:
        The model, and the origin of its weights: ``loaded from X`` or ``random``.

    Raises:
        UserError: weights are missing, damaged or of other shapes; the attention is not available.
        UsageError: no model can be built from the configuration.
    """
    source = options.model_name_or_path
    if source is None:
        model = _build_random(options, config)
        origin = "random"
    else:
        model = _load("--model_name_or_path", source, options, config)
        if tokenizer is not None:
            _fit_vocabulary(model, tokenizer)
        origin = f"loaded from {source}"
    if options.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"--gradient_checkpointing: {config.model_type} does not support it; leave out --gradient_checkpointing"
            )
        _enable_gradient_checkpointing(model)
    model.train()
    return model, origin


def _enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    # transformers 5.23 renamed the method and warns about the old name.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _build_random(options: ModelOptions, config: PretrainedConfig) -> PreTrainedModel:
    try:
        auto: Any = AutoModelForCausalLM
        model: PreTrainedModel = auto.from_config(
            config,
            dtype=torch.float32,
            trust_remote_code=options.trust_remote_code,
            **_attention_argument(options),
        )
    except (ValueError, ImportError) as error:
        _raise_if_attention(options, error)
        raise UsageError(f"--config_overrides: {config.model_type} cannot be built: {first_line(error)}") from error
    return model


def _load(flag: str, source: str, options: ModelOptions, config: PretrainedConfig) -> PreTrainedModel:
    try:
        with _quiet_transformers():
            auto: Any = AutoModelForCausalLM
            model, report = auto.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                trust_remote_code=options.trust_remote_code,
                output_loading_info=True,
                # `_require_all_weights` refuses mismatches, in one line that names them.
                ignore_mismatched_sizes=True,
                **_attention_argument(options),
            )
    # Reading and unpickling weights raises many types of exceptions, all caused by the file.
    except Exception as error:
        _raise_if_attention(options, error)
        raise _weights_error(flag, source, error) from error
    _require_all_weights(flag, source, report)
    loaded: PreTrainedModel = model
    return loaded


def _attention_argument(options: ModelOptions) -> dict[str, str]:
    """The argument `attn_implementation`, left out if not chosen: None would replace that of the configuration."""
    return {} if options.attn_implementation is None else {"attn_implementation": options.attn_implementation}


def _raise_if_attention(options: ModelOptions, error: Exception) -> None:
    """Raise a UserError of one line if the choice of attention caused the error."""
    name = options.attn_implementation
    if name is None or isinstance(error, OSError):
        return
    if isinstance(error, ImportError) or "attn_implementation" in str(error) or "attention" in str(error).lower():
        raise UserError(
            f"--attn_implementation {name}: {first_line(error)} Use eager or sdpa, or leave out --attn_implementation"
        ) from error


def _require_all_weights(flag: str, source: str, report: dict[str, Any]) -> None:
    """Refuse weights that are missing or of other shapes; log those that the model does not use."""
    mismatched = sorted(entry[0] for entry in report["mismatched_keys"])
    missing = sorted(report["missing_keys"])
    if mismatched:
        raise UserError(
            f"{flag} {source}: the shapes of these weights differ from those of the configuration: "
            f"{_first_names(mismatched)}; use the config.json that belongs to the weights"
        )
    if missing:
        raise UserError(
            f"{flag} {source}: the model needs weights that are missing: {_first_names(missing)}; "
            "use a checkpoint of the same architecture"
        )
    unused = sorted(report["unexpected_keys"])
    if unused:
        log.warning("%s: weights that this model does not use are ignored: %s", source, _first_names(unused))


def _first_names(names: list[str]) -> str:
    """The first three names, and the number of the others."""
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
        except (SafetensorError, OSError) as damage:
            return UserError(f"{flag} {source}: {file} is damaged ({first_line(damage)}); copy or download it again")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return UserError(
            f"{flag} {source}: no weights in this folder (no model.safetensors); "
            f"to start from random weights use --config_name"
        )
    return UserError(f"{flag} {source}: the weights cannot be loaded: {first_line(error)}; copy or download them again")


def _folder_of(source: str) -> Path | None:
    """Folder of the files: `source` itself, or that of a cached repository; None if there is none."""
    if Path(source).is_dir():
        return Path(source)
    try:
        cached = try_to_load_from_cache(source, "config.json")
    except ValueError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Resize the embeddings to the length of the tokenizer, and fit the special ids."""
    embeddings: Any = model.get_input_embeddings()
    num_rows: int = embeddings.weight.shape[0]
    if num_rows != len(tokenizer):
        with _quiet_transformers():
            model.resize_token_embeddings(len(tokenizer))
        num_added = len(tokenizer) - num_rows
        change = f"{num_added} new rows" if num_added > 0 else f"{-num_added} rows without a token dropped"
        log.info("embeddings: resized from %d rows to the %d of the tokenizer (%s)", num_rows, len(tokenizer), change)
    fit_special_ids(model, tokenizer)


def fit_special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace, in place, special ids of the configurations that lie beyond the tokenizer by those of the tokenizer."""
    special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for settings in (model.config.get_text_config(decoder=True), model.generation_config):
        for name, token_id in special_ids.items():
            current = getattr(settings, name, None)
            if isinstance(current, int) and current >= len(tokenizer):
                setattr(settings, name, token_id)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Turn off progress bars, tables and warnings of transformers; this module reports what matters in one line."""
    library: Any = transformers_logging
    had_progress_bar = library.is_progress_bar_enabled()
    level = library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if had_progress_bar:
            library.enable_progress_bar()
