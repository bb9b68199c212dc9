"""What a tokenizer's ids are: a hash of how it behaves, and the bytes that each id stands for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE_MARK = "\u2581"


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of how the tokenizer turns text into ids, wherever it is stored."""
    backend = _backend(tokenizer)
    if backend is not None:
        # Truncation and padding are switched by calls, and never change the ids of a text.
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
    """Whether every token but the special ones is one character, the line break among them."""
    vocab = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    return "\n" in vocab and all(len(token) == 1 for token in vocab if token not in special)


def token_byte_counts(tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.int32]:
    """UTF-8 bytes of text that each id stands for.

    Exact for byte-level and character tokenizers, where the sum over the ids of a text is the
    length of its UTF-8 encoding; a token that is part of a character counts its own bytes.
    Sentencepiece marks count as the space they stand for, also the one put before a text. Special
    tokens count 0.

    Returns:
        int32 [len(tokenizer)].
    """
    counts = np.zeros(len(tokenizer), dtype=np.int32)
    special = set(tokenizer.all_special_ids)
    added = dict(tokenizer.added_tokens_decoder)
    special |= {i for i, token in added.items() if token.special}
    count = _counter(tokenizer)
    for token, i in tokenizer.get_vocab().items():
        if i < len(counts) and i not in special:
            counts[i] = len(added[i].content.encode()) if i in added else count(token)
    return counts


def _counter(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The function from a token, as the vocabulary spells it, to its number of bytes."""
    backend = _backend(tokenizer)
    vocab = tokenizer.get_vocab()
    if backend is None:
        parts = {"ByteLevel"} if "\u0120" in vocab else set()
    else:
        parts = {*_types(backend.get("decoder")), *_types(backend.get("pre_tokenizer"))}
    if "ByteLevel" in parts:
        alphabet = frozenset(pre_tokenizers.ByteLevel.alphabet())
        return lambda token: len(token) if alphabet.issuperset(token) else len(token.encode())
    if "WordPiece" in parts:
        return lambda token: len(token.removeprefix("##").encode()) + (not token.startswith("##"))
    if any(token.startswith(_SPACE_MARK) and len(token) > 1 for token in vocab):
        return lambda token: 1 if _BYTE_TOKEN.fullmatch(token) else len(token.replace(_SPACE_MARK, " ").encode())
    return lambda token: len(token.encode())


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The `tokenizers` library's own description, or None for a tokenizer written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    description: dict[str, Any] = json.loads(backend.to_str())
    return description


def _types(part: Any) -> Iterator[str]:
    """The types of a component and of everything in it."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        for value in part.values():
            yield from _types(value)
    elif isinstance(part, list):
        for value in part:
            yield from _types(value)
