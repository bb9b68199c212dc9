"""The configuration of a model: read or made from defaults, changed, fitted to a tokenizer."""

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

# What `context_limit` says of a model that takes blocks of any length (state space models, ALiBi).
UNLIMITED = 2**31 - 1

# Tokenizers without a limit of their own carry a huge number instead.
_LARGEST_SANE_LENGTH = 1_000_000

# Tables of embeddings are padded to a multiple of 64 or 128, at most 512, and a few tokens may be added; a larger gap,
# or one of more than a twentieth, is another vocabulary.
LARGEST_PADDING = 512

_DROPOUT = re.compile(r"dropout|pdrop$|_drop$")
_OTHER_DROPOUT = re.compile(r"classifier|summary|layerdrop")
_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[\]{}]*[\]}])")


def read_config(options: ModelOptions) -> PretrainedConfig:
    """The configuration that the options name, before it is fitted to a tokenizer.

    ``--config_name`` comes before ``--model_name_or_path``, and that before ``--model_type`` (gpt2
    when nothing is named). Reads one small file at most, so that a wrong name is reported before
    any work.

    Raises:
        UserError: no such name, an unreadable file, or a model that is not a causal language model.
        UsageError: unknown --model_type, or --config_overrides that the configuration does not
            take.
    """
    if options.config_name is not None:
        config = _read("--config_name", options.config_name, options.trust_remote_code)
    elif options.model_name_or_path is not None:
        config = _read("--model_name_or_path", options.model_name_or_path, options.trust_remote_code)
    else:
        config = _defaults(options.model_type or DEFAULT_MODEL_TYPE)
    _require_causal(config, trusted=options.trust_remote_code)
    if options.config_overrides is not None:
        named = options.config_name or options.model_name_or_path
        config = _changed(
            config,
            parse_overrides(options.config_overrides, config),
            start=config.to_dict() if named else {},
        )
    if options.dropout is not None:
        set_dropout(config, options.dropout)
    return config


def load_config(options: ModelOptions, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The model's configuration, fitted to the tokenizer when the model is built from scratch.

    From scratch: vocab_size is the tokenizer's length, and the special ids are the tokenizer's.
    With ``--model_name_or_path`` the vocabulary stays the weights' own until `build_model` fits the
    table.

    Raises:
        UserError: what `read_config` raises, or a tokenizer that was not made for the weights.
        UsageError: as `read_config`.
    """
    config = read_config(options)
    if options.model_name_or_path is not None:
        _require_same_vocabulary(options.model_name_or_path, config, tokenizer)
        return config
    asked = _asked_vocab_size(options, config)
    if asked is not None and asked != len(tokenizer):
        log.warning(
            "--config_overrides vocab_size=%d: the tokenizer has %d tokens, which decides",
            asked,
            len(tokenizer),
        )
    fitted = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if getattr(config, "is_decoder", True) is False:
        # Encoders of the BERT family see the future unless told; others do not read this.
        fitted["is_decoder"] = True
    return _changed(config, fitted, start=config.to_dict())


def context_limit(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """Tokens of the longest block: the model's limit, or the tokenizer's if that is smaller.

    2**31 - 1 when neither has a limit.
    """
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limits = [value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0]
    if tokenizer is not None and 0 < tokenizer.model_max_length < _LARGEST_SANE_LENGTH:
        limits.append(int(tokenizer.model_max_length))
    return min(limits, default=UNLIMITED)


def parse_overrides(text: str, config: PretrainedConfig) -> dict[str, Any]:
    """`n_layer=4,n_embd=128` as a dictionary, the values typed as the configuration's own.

    Lists and dictionaries are written as JSON. Where the configuration has None, so is any other
    value.

    Raises:
        UsageError: a part without `=`, an unknown key, or a value of another type.
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
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UsageError(
                f"--config_overrides {part.strip()}: expected key=value pairs with commas, such as n_layer=4,n_embd=128"
            )
        if key not in known:
            raise UsageError(
                f"--config_overrides {key}: not in the configuration of {config.model_type}{suggestion(key, known)}"
            )
        overrides[config.attribute_map.get(key, key)] = _typed(key, value, getattr(config, key, None))
    return overrides


def set_dropout(config: PretrainedConfig, rate: float) -> None:
    """Sets every dropout rate of the language model, in place; heads of classifiers keep theirs."""
    names = [
        name
        for name, value in config.to_dict().items()
        if _DROPOUT.search(name) and not _OTHER_DROPOUT.search(name) and isinstance(value, float | int)
    ]
    for name in names:
        setattr(config, name, rate)
    if not names:
        log.warning("--dropout %g: %s has no dropout", rate, config.model_type)


def _read(flag: str, name: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{flag} {name}: this repository brings its own code; add --trust_remote_code to run it"
            ) from error
        if Path(name).is_dir() and not (Path(name) / "config.json").exists():
            raise UserError(f"{flag} {name}: no config.json in this folder") from error
        raise name_error(flag, name, "config.json", error) from error
    return config


def _defaults(model_type: str) -> PretrainedConfig:
    if model_type not in CONFIG_MAPPING:
        raise UsageError(
            f"--model_type {model_type}: unknown{suggestion(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
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


def _changed(config: PretrainedConfig, changes: Mapping[str, Any], *, start: Mapping[str, Any]) -> PretrainedConfig:
    """A new configuration, made by the class, which derives and checks again what it does."""
    values = {**start, **changes}
    for name in ("model_type", "transformers_version"):
        values.pop(name, None)
    _drop_derived(config, values, changes)
    try:
        changed = type(config)(**values)
    except (ValueError, TypeError) as error:
        cause = " ".join(line.strip() for line in str(error).splitlines())
        raise UsageError(f"{config.model_type} refuses {dict(changes)}: {cause}") from error
    changed._name_or_path = config._name_or_path
    return changed


def _drop_derived(config: PretrainedConfig, values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Takes out, in place, what follows from a changed number and would contradict it."""
    if {"num_attention_heads", "hidden_size"} & set(changes):
        num_heads = getattr(config, "num_attention_heads", None)
        # A state-space model has none, and nothing follows from them.
        derived = {"head_dim": config.hidden_size // num_heads, "num_key_value_heads": num_heads} if num_heads else {}
        for name, present in derived.items():
            if name not in changes and values.get(name) == present:
                del values[name]
    num_layers = changes.get(config.attribute_map.get("num_hidden_layers", "num_hidden_layers"))
    kinds = values.get("layer_types")
    if num_layers is not None and kinds and "layer_types" not in changes:
        # Fewer layers: the first ones. More: the class's own pattern.
        values["layer_types"] = kinds[:num_layers] if num_layers <= len(kinds) else None
    if config.model_type == "gpt_neo" and {"num_layers", "attention_types"} & set(changes):
        values.pop("attention_layers", None)
        if "attention_types" not in changes:
            # GPT-Neo's pattern, local attention in every second layer, for the number of layers.
            pairs, rest = divmod(values["num_layers"], 2)
            pattern = [[["global", "local"], pairs], [["global"], rest]]
            values["attention_types"] = [part for part in pattern if part[1]]


def _typed(key: str, value: str, present: Any) -> Any:
    """The value of an override, of the type of the present one."""
    kind = "text" if isinstance(present, str) else type(present).__name__
    mistake = UsageError(f"--config_overrides {key}={value}: expected {kind}, as the present {present!r}")
    if isinstance(present, str):
        return value
    if isinstance(present, bool):
        if value.lower() not in ("true", "false", "1", "0", "yes", "no", "y", "n"):
            raise mistake
        return value.lower() in ("true", "1", "yes", "y")
    try:
        if isinstance(present, int):
            return int(value)
        if isinstance(present, float):
            return float(value)
        parsed = json.loads({"None": "null", "True": "true", "False": "false"}.get(value, value))
    except ValueError as error:
        if present is None:
            return value
        raise mistake from error
    if present is not None and not isinstance(parsed, type(present) | None):
        raise mistake
    return parsed


def _asked_vocab_size(options: ModelOptions, config: PretrainedConfig) -> int | None:
    if options.config_overrides is None:
        return None
    size = parse_overrides(options.config_overrides, config).get("vocab_size")
    return int(size) if size is not None else None


def _require_same_vocabulary(name: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer from elsewhere whose length is not that of the weights."""
    own = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if own is None or tokenizer.name_or_path == name:
        return
    gap = own - len(tokenizer)
    is_padding = 0 <= gap <= LARGEST_PADDING and own % 64 == 0
    if is_padding or abs(gap) <= min(LARGEST_PADDING, own // 20):
        return
    raise UserError(
        f"vocabulary mismatch: the weights of {name} know {own} tokens, the tokenizer has "
        f"{len(tokenizer)}; leave "
        f"--tokenizer_name out to use the model's own, or build from scratch with "
        f"--config_name {name}"
    )
