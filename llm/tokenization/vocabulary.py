"""Facts about a tokenizer's ids: a hash of its behaviour, and the number of bytes that each id stands for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE_MARK = "\u2581"


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 hex digest of how the tokenizer turns text into ids; it does not depend on names or paths."""
    backend = _backend(tokenizer)
    if backend is not None:
        # Calls change truncation and padding, which never change the ids of a text.
        behaviour: Any = {key: value for key, value in backend.items() if key not in ("truncation", "padding")}
    else:
        behaviour = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    ids = [
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
        tokenizer.pad_token_id,
    ]
    text = json.dumps([behaviour, ids], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_character_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether all tokens but the special ones are single characters, including the line break."""
    vocab = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    return "\n" in vocab and all(len(token) == 1 for token in vocab if token not in special)


def token_byte_counts(tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.int32]:
    """Return the number of UTF-8 bytes of text that each id stands for.

    The counts are exact for byte-level and character tokenizers: their sum over the ids of a text is the length of the
    text in UTF-8; a token that is a part of a character counts its own bytes. A sentencepiece mark counts as the space
    that it stands for, also the mark that is put before a text. Special tokens count 0.

    Returns:
        int32 [len(tokenizer)].
    """
    counts = np.zeros(len(tokenizer), dtype=np.int32)
    special = set(tokenizer.all_special_ids)
    added = dict(tokenizer.added_tokens_decoder)
    special |= {i for i, token in added.items() if token.special}
    count_bytes = _byte_counter(tokenizer)
    for token, i in tokenizer.get_vocab().items():
        if i < len(counts) and i not in special:
            counts[i] = len(added[i].content.encode()) if i in added else count_bytes(token)
    return counts


def _byte_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """Return the function from a token, as the vocabulary spells it, to its number of bytes."""
    backend = _backend(tokenizer)
    vocab = tokenizer.get_vocab()
    if backend is None:
        types = {"ByteLevel"} if "\u0120" in vocab else set()
    else:
        types = {*_types(backend.get("decoder")), *_types(backend.get("pre_tokenizer"))}
    if "ByteLevel" in types:
        alphabet = frozenset(pre_tokenizers.ByteLevel.alphabet())
        return lambda token: len(token) if alphabet.issuperset(token) else len(token.encode())
    if "WordPiece" in types:
        # Without ## the token begins a word, after a space.
        return lambda token: len(token[2:].encode()) if token.startswith("##") else 1 + len(token.encode())
    if any(token.startswith(_SPACE_MARK) and len(token) > 1 for token in vocab):
        return lambda token: 1 if _BYTE_TOKEN.fullmatch(token) else len(token.replace(_SPACE_MARK, " ").encode())
    return lambda token: len(token.encode())


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Return the backend as the `tokenizers` library describes it, or None for a tokenizer written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    description: dict[str, Any] = json.loads(backend.to_str())
    return description


def _types(component: Any) -> Iterator[str]:
    """Yield the types of a component of a tokenizer and of all components inside it."""
    if isinstance(component, dict):
        if isinstance(component.get("type"), str):
            yield component["type"]
        for value in component.values():
            yield from _types(value)
    elif isinstance(component, list):
        for value in component:
            yield from _types(value)
