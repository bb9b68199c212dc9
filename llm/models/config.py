"""The configuration of a model: read or made from defaults, changed, and fitted to a tokenizer."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm.config.errors import UsageError, UserError
from llm.config.options import ModelOptions
from llm.hub.names import name_error, suggestion

log = logging.getLogger(__name__)

DEFAULT_MODEL_TYPE = "gpt2"

# Result of `context_limit` for a model that accepts blocks of any length (state space models, ALiBi).
UNLIMITED = 2**31 - 1

# A tokenizer without a length limit has a huge number as its limit.
_MAX_TOKENIZER_LENGTH = 1_000_000

# Embeddings are padded to a multiple of 64 or 128, at most 512, and a tokenizer may have a few added tokens. A larger
# difference, or one of more than a twentieth of the vocabulary, means another vocabulary.
MAX_PADDING = 512

_DROPOUT = re.compile(r"dropout|pdrop$|_drop$")
_OTHER_DROPOUT = re.compile(r"classifier|summary|layerdrop")
_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[\]{}]*[\]}])")


def read_config(options: ModelOptions) -> PretrainedConfig:
    """Return the configuration that the options name, before it is fitted to a tokenizer.

    ``--config_name`` takes precedence over ``--model_name_or_path``, and that over ``--model_type`` (gpt2 if none of
    them is given). The function reads one small file at most, so a wrong name is reported before any work.

    Raises:
        UserError: the name does not exist, the file is unreadable, or the model is not a causal language model.
        UsageError: --model_type is unknown, or the configuration does not accept --config_overrides.
    """
    if options.config_name is not None:
        config = _read("--config_name", options.config_name, options.trust_remote_code)
    elif options.model_name_or_path is not None:
        config = _read("--model_name_or_path", options.model_name_or_path, options.trust_remote_code)
    else:
        config = _defaults(options.model_type or DEFAULT_MODEL_TYPE)
    _require_causal(config, trusted=options.trust_remote_code)
    if options.config_overrides is not None:
        is_from_file = options.config_name is not None or options.model_name_or_path is not None
        config = _with_changes(
            config,
            parse_overrides(options.config_overrides, config),
            base_values=config.to_dict() if is_from_file else {},
        )
    if options.dropout is not None:
        set_dropout(config, options.dropout)
    return config


def load_config(options: ModelOptions, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Return the configuration of the model, fitted to the tokenizer if the model is built from scratch.

    From scratch, vocab_size is the length of the tokenizer, and the special ids are those of the tokenizer. With
    ``--model_name_or_path`` the vocabulary is that of the weights until `build_model` resizes the embeddings.

    Raises:
        UserError: as `read_config`, or the tokenizer was not made for the weights.
        UsageError: as `read_config`.
    """
    config = read_config(options)
    if options.model_name_or_path is not None:
        _require_same_vocabulary(options.model_name_or_path, config, tokenizer)
        return config
    requested_size = _requested_vocab_size(options, config)
    if requested_size is not None and requested_size != len(tokenizer):
        log.warning(
            "--config_overrides vocab_size=%d is ignored: the vocabulary has the %d tokens of the tokenizer",
            requested_size,
            len(tokenizer),
        )
    changes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if getattr(config, "is_decoder", True) is False:
        # Models of the BERT family attend to later tokens unless this is set; other models ignore it.
        changes["is_decoder"] = True
    return _with_changes(config, changes, base_values=config.to_dict())


def context_limit(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """Return the largest block size in tokens: the smaller of the limits of the model and the tokenizer.

    The result is `UNLIMITED`, 2**31 - 1, if neither has a limit.
    """
    text_config = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limits = [value for name in names if isinstance(value := getattr(text_config, name, None), int) and value > 0]
    if tokenizer is not None and 0 < tokenizer.model_max_length < _MAX_TOKENIZER_LENGTH:
        limits.append(int(tokenizer.model_max_length))
    return min(limits, default=UNLIMITED)


def is_same_vocabulary(vocab_size: int, num_tokens: int) -> bool:
    """Return whether `vocab_size` rows of embeddings can be those of a tokenizer of `num_tokens` tokens.

    The rows may be padded, and a tokenizer may have a few added tokens.
    """
    difference = vocab_size - num_tokens
    is_padding = 0 <= difference <= MAX_PADDING and vocab_size % 64 == 0
    return is_padding or abs(difference) <= min(MAX_PADDING, vocab_size // 20)


def parse_overrides(text: str, config: PretrainedConfig) -> dict[str, Any]:
    """Return `n_layer=4,n_embd=128` as a dictionary; each value has the type of the configuration's current value.

    Lists and dictionaries are written as JSON. If the current value is None, every value is read as JSON, and as text
    if it is not JSON.

    Raises:
        UsageError: a part has no `=`, a key is unknown, or a value has another type.
    """
    known = {*config.to_dict(), *config.attribute_map} - {
        "model_type",
        "transformers_version",
        "architectures",
    }
    overrides: dict[str, Any] = {}
    for part in _COMMA_OUTSIDE_BRACKETS.split(text):
        if not part.strip():
            continue
        key, equals, value = (text.strip() for text in part.partition("="))
        if not equals:
            raise UsageError(
                f"--config_overrides {part.strip()}: expected key=value pairs separated by commas, "
                "such as n_layer=4,n_embd=128"
            )
        if key not in known:
            raise UsageError(
                f"--config_overrides {key}: the configuration of {config.model_type} has no such key"
                f"{suggestion(key, known)}"
            )
        overrides[config.attribute_map.get(key, key)] = _parse_value(key, value, getattr(config, key, None))
    return overrides


def set_dropout(config: PretrainedConfig, rate: float) -> None:
    """Set every dropout rate of the language model, in place, except those of classifiers and layerdrop."""
    names = [
        name
        for name, value in config.to_dict().items()
        if _DROPOUT.search(name) and not _OTHER_DROPOUT.search(name) and isinstance(value, float | int)
    ]
    for name in names:
        setattr(config, name, rate)
    if not names:
        log.warning("--dropout %g is ignored: %s has no dropout", rate, config.model_type)


def _read(flag: str, name: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{flag} {name}: this repository contains its own code; add --trust_remote_code to run it"
            ) from error
        if Path(name).is_dir() and not (Path(name) / "config.json").exists():
            raise UserError(
                f"{flag} {name}: no config.json in this folder; give a folder that save_pretrained wrote"
            ) from error
        raise name_error(flag, name, "config.json", error) from error
    return config


def _defaults(model_type: str) -> PretrainedConfig:
    if model_type not in CONFIG_MAPPING:
        raise UsageError(
            f"--model_type {model_type}: unknown model type{suggestion(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
        )
    config: PretrainedConfig = CONFIG_MAPPING[model_type]()
    return config


def _require_causal(config: PretrainedConfig, *, trusted: bool) -> None:
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or trusted:
        return
    raise UserError(
        f"{config.model_type} is not a causal language model of transformers; "
        f"choose one that is, such as gpt2, gpt_neo or llama"
    )


def _with_changes(
    config: PretrainedConfig, changes: Mapping[str, Any], *, base_values: Mapping[str, Any]
) -> PretrainedConfig:
    """A new configuration of the same class, which checks all values and computes derived ones."""
    values = {**base_values, **changes}
    for name in ("model_type", "transformers_version"):
        values.pop(name, None)
    _drop_derived(config, values, changes)
    try:
        changed = type(config)(**values)
    except (ValueError, TypeError) as error:
        cause = " ".join(line.strip() for line in str(error).splitlines())
        raise UsageError(
            f"the configuration of {config.model_type} does not accept {dict(changes)}: {cause}"
        ) from error
    changed._name_or_path = config._name_or_path
    return changed


def _drop_derived(config: PretrainedConfig, values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Remove, in place, values that were derived from a changed value and would contradict it."""
    if {"num_attention_heads", "hidden_size"} & set(changes):
        num_heads = getattr(config, "num_attention_heads", None)
        # A state-space model has no heads, so nothing is derived from them.
        derived = {"head_dim": config.hidden_size // num_heads, "num_key_value_heads": num_heads} if num_heads else {}
        for name, derived_value in derived.items():
            if name not in changes and values.get(name) == derived_value:
                del values[name]
    num_layers = changes.get(config.attribute_map.get("num_hidden_layers", "num_hidden_layers"))
    layer_types = values.get("layer_types")
    if num_layers is not None and layer_types and "layer_types" not in changes:
        # Fewer layers: keep the types of the first ones. More layers: use the default pattern of the class.
        values["layer_types"] = layer_types[:num_layers] if num_layers <= len(layer_types) else None
    if config.model_type == "gpt_neo" and {"num_layers", "attention_types"} & set(changes):
        values.pop("attention_layers", None)
        if "attention_types" not in changes:
            # GPT-Neo's pattern for this number of layers: local attention in every second layer.
            pairs, rest = divmod(values["num_layers"], 2)
            pattern = [[["global", "local"], pairs], [["global"], rest]]
            values["attention_types"] = [entry for entry in pattern if entry[1]]


def _parse_value(key: str, value: str, current: Any) -> Any:
    """The value of an override, in the type of the current value."""
    expected_type = "text" if isinstance(current, str) else type(current).__name__
    mistake = UsageError(
        f"--config_overrides {key}={value}: expected {expected_type}, like the current value {current!r}"
    )
    if isinstance(current, str):
        return value
    if isinstance(current, bool):
        if value.lower() not in ("true", "false", "1", "0", "yes", "no", "y", "n"):
            raise mistake
        return value.lower() in ("true", "1", "yes", "y")
    try:
        if isinstance(current, int):
            return int(value)
        if isinstance(current, float):
            return float(value)
        parsed = json.loads({"None": "null", "True": "true", "False": "false"}.get(value, value))
    except ValueError as error:
        if current is None:
            return value
        raise mistake from error
    if current is not None and not isinstance(parsed, type(current) | None):
        raise mistake
    return parsed


def _requested_vocab_size(options: ModelOptions, config: PretrainedConfig) -> int | None:
    if options.config_overrides is None:
        return None
    size = parse_overrides(options.config_overrides, config).get("vocab_size")
    return int(size) if size is not None else None


def _require_same_vocabulary(name: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer of another origin whose length does not match the weights."""
    vocab_size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if vocab_size is None or tokenizer.name_or_path == name or is_same_vocabulary(vocab_size, len(tokenizer)):
        return
    raise UserError(
        f"vocabulary mismatch: the weights of {name} have {vocab_size} tokens, the tokenizer has {len(tokenizer)}; "
        f"leave out --tokenizer_name to use the tokenizer of the model, or build from scratch with --config_name {name}"
    )
