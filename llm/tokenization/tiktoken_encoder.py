"""Encode with tiktoken and a byte-level BPE tokenizer's vocabulary, for tokenizers whose ids are the same."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers

from llm.system.worker_pool import WorkerPool
from llm.tokenization.split_patterns import GPT2_PATTERN, UnsuitableError, differing_characters, read_pattern

# Characters encoded by one call, so that the working set fits in the processor's cache.
_GROUP_CHARS = 1 << 16

# Characters. tiktoken's regex engine fails on more than about 300,000 white space characters in a row.
_LONGEST_WHITE_SPACE = 1 << 16

# Separates the texts that are encoded by one call. Unicode reserves this character for ever, so no text should have it.
# tiktoken gets it as a special token, so no word spans it.
_SEPARATOR = "\ufdd0"


class Vocabulary(NamedTuple):
    """Tokens as byte strings, in the order of their merges.

    Attributes:
        ranks: rank of each byte string: first the 256 bytes, then the result of each merge.
        ids: uint32 [number of ranks], the tokenizer's id of each rank.
    """

    ranks: dict[bytes, int]
    ids: NDArray[np.uint32]


class TiktokenEncoder:
    """Encodes texts with tiktoken. It can be pickled; a process that uses it needs few imports.

    Args:
        backend: the `tokenizers` backend of the tokenizer.
        split_special_tokens: whether added tokens that occur in a text are encoded as ordinary text.
        workers: processes that may help to build the encoder, which ignores the value that they share.

    Raises:
        UnsuitableError: tiktoken would not give the ids of this tokenizer, or is not installed.
    """

    def __init__(self, backend: Tokenizer, *, split_special_tokens: bool, workers: WorkerPool | None = None) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise UnsuitableError("tiktoken is not installed") from error
        description = json.loads(backend.to_str())
        if description["normalizer"] is not None:
            raise UnsuitableError("the tokenizer changes the text before it splits it")
        self._pattern = read_pattern(description["pre_tokenizer"])
        added = description["added_tokens"]
        # Finding these characters and reading the vocabulary take most of a second each: do both at the same time.
        future = None if workers is None else workers.submit(_differing_characters, self._pattern)
        vocabulary = read_vocabulary(description["model"], {token["content"] for token in added})
        literal = _literal_tokens(added, split_special_tokens)
        not_literal = [token["content"] for token in added if token["content"] not in literal]
        if any(_SEPARATOR in token["content"] for token in added):
            raise UnsuitableError("an added token has a reserved character")
        num_ranks = len(vocabulary.ranks)
        special = {content: num_ranks + index for index, content in enumerate([*literal, _SEPARATOR])}
        self._separator = special[_SEPARATOR]
        ids = np.concatenate([vocabulary.ids, np.array([*literal.values(), 0], dtype=np.uint32)])
        # None if ids and ranks are the same, as for GPT-2.
        self._ids = None if np.array_equal(ids[:num_ranks], np.arange(num_ranks)) and not literal else ids
        self._sizes = np.array([len(token) for token in vocabulary.ranks] + [len(token.encode()) for token in special])
        self._special = frozenset(special)
        differing = differing_characters(self._pattern) if future is None else future.result()
        self._unsuitable_in_ascii = _any_of(not_literal)
        self._unsuitable = _any_of([*not_literal, _SEPARATOR, *differing])
        self._encoding = tiktoken.Encoding(
            "llm", pat_str=self._pattern, mergeable_ranks=vocabulary.ranks, special_tokens=special
        )

    def encode(self, texts: list[str]) -> list[NDArray[np.uint32] | None]:
        """Return the ids of each text: uint32 [number of tokens]; None for a text that the tokenizer must encode."""
        encoded: list[NDArray[np.uint32] | None] = [None] * len(texts)
        for group in self._groups(texts):
            joined = _SEPARATOR.join(texts[index] for index in group)
            ranks = self._encoding.encode_to_numpy(joined, allowed_special=self._special, disallowed_special=())
            if self._pattern != GPT2_PATTERN and int(self._sizes[ranks].sum()) != len(joined.encode()):
                continue  # the pattern does not match every character
            ids = ranks if self._ids is None else self._ids[ranks]
            start = 0
            ends = np.flatnonzero(ranks == self._separator).tolist() if len(group) > 1 else []
            for index, end in zip(group, [*ends, len(ids)], strict=True):
                encoded[index] = ids[start:end]
                start = end + 1
        return encoded

    def _groups(self, texts: list[str]) -> Iterator[list[int]]:
        """Yield the indices of the texts that tiktoken may encode, in groups to encode by one call."""
        group: list[int] = []
        num_chars = 0
        for index, text in enumerate(texts):
            if self._is_unsuitable(text):
                continue
            group.append(index)
            num_chars += len(text)
            if num_chars >= _GROUP_CHARS:
                yield group
                group = []
                num_chars = 0
        if group:
            yield group

    def _is_unsuitable(self, text: str) -> bool:
        """Return whether the tokenizer must encode the text."""
        pattern = self._unsuitable_in_ascii if text.isascii() else self._unsuitable
        if pattern is not None and pattern.search(text) is not None:
            return True
        # A run of twice this length contains a whole part that begins at a multiple of the length.
        starts = range(0, len(text) - _LONGEST_WHITE_SPACE, _LONGEST_WHITE_SPACE)
        return any(text[start : start + _LONGEST_WHITE_SPACE].isspace() for start in starts)


def encode_packed(encoder: TiktokenEncoder, texts: list[str], dtype: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Encode texts into two arrays, which are cheap to send to another process.

    Args:
        encoder: encodes the texts.
        texts: what to encode.
        dtype: of the ids, `uint16` or `uint32`; it must hold every id of the vocabulary.

    Returns:
        The number of ids of each text, -1 for a text that the tokenizer must encode: int64 [number of texts]; and the
        concatenated ids: `dtype` [total number of ids].
    """
    encoded = encoder.encode(texts)
    lengths = np.array([-1 if ids is None else len(ids) for ids in encoded], dtype=np.int64)
    arrays = [ids for ids in encoded if ids is not None]
    if not arrays:
        return lengths, np.array([], dtype=dtype)
    return lengths, np.concatenate(arrays, dtype=dtype, casting="same_kind")


def unpack(lengths: NDArray[np.int64], ids: NDArray[Any]) -> list[NDArray[Any] | None]:
    """Split the arrays of `encode_packed` into one array a text.

    Args:
        lengths: number of ids of each text, -1 for none: int64 [number of texts].
        ids: the concatenated ids: uint16 or uint32 [total number of ids].

    Returns:
        Views of `ids`, one [number of tokens] for each text; None for the length -1.
    """
    unpacked: list[NDArray[Any] | None] = []
    start = 0
    for length in lengths.tolist():
        if length < 0:
            unpacked.append(None)
        else:
            unpacked.append(ids[start : start + length])
            start += length
    return unpacked


def _differing_characters(_: object, pattern: str) -> str:
    """Call `differing_characters` in a worker, which passes the value that it shares as first argument."""
    return differing_characters(pattern)


def read_vocabulary(model: dict[str, Any], added: set[str]) -> Vocabulary:
    """Return the vocabulary of a byte-level BPE for which tiktoken merges in the same order.

    tiktoken merges any two neighbours whose union is a token, lowest rank first. BPE merges the pairs of its list,
    first of the list first. Both give the same result if the merges of the list build every token, taken alone, from
    parts that are earlier in the list: where the union of two neighbours is a token, and no union of lower rank
    remains, these neighbours are the two parts that the list merges last.

    Args:
        model: the section `model` of a tokenizer.json.
        added: tokens that are found before the text is split into words.

    Raises:
        UnsuitableError: the model is not a byte-level BPE, or tiktoken would merge in another order.
    """
    if model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        raise UnsuitableError("the model is not plain BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UnsuitableError("the model marks the parts of words")
    vocab: dict[str, int] = model["vocab"]
    alphabet = byte_alphabet()
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if not alphabet.keys() <= vocab.keys():
        raise UnsuitableError("the vocabulary lacks some of the 256 bytes")
    ranks = dict(sorted(alphabet.items(), key=lambda pair: pair[1]))
    for left, right in merges:
        token = left + right
        if left not in ranks or right not in ranks:
            raise UnsuitableError("a merge joins a token that no earlier merge makes")
        if ranks.setdefault(token, len(ranks)) != len(ranks) - 1:
            raise UnsuitableError("the merges of one token are not consecutive")
    if not ranks.keys() <= vocab.keys():
        raise UnsuitableError("the result of a merge is not in the vocabulary")
    ignore_merges = bool(model.get("ignore_merges"))
    if ignore_merges and not vocab.keys() <= ranks.keys() | added:
        raise UnsuitableError("a token cannot be reached by merges")
    _check_merges(vocab, ranks, merges, ignore_merges)
    ids = np.array([vocab[token] for token in ranks], dtype=np.uint32)
    # In Latin-1 the characters 0 to 255 are encoded as the bytes 0 to 255.
    table = str.maketrans({character: chr(byte) for character, byte in alphabet.items()})
    return Vocabulary({token.translate(table).encode("latin-1"): rank for token, rank in ranks.items()}, ids)


def _check_merges(
    vocab: dict[str, int], ranks: dict[str, int], merges: list[tuple[str, ...]], ignore_merges: bool
) -> None:
    """Check that the merges build every token from its bytes.

    Raises:
        UnsuitableError: they do not.
    """
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[(left, right) for left, right in merges], cache_capacity=0))
    tokens = list(ranks)
    # Encode all tokens as words of one text, which is faster than one by one, and nearly always sufficient.
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if len(bpe.encode_batch_fast([" ".join(tokens)], add_special_tokens=False)[0]) == len(tokens):
        return
    pairs = set(merges)
    for token, encoding in zip(tokens, bpe.encode_batch_fast(tokens, add_special_tokens=False), strict=True):
        if len(encoding) == 1:
            continue
        # With ignore_merges a word that is a token gets its id without merges. Then the list must contain every pair
        # of tokens that forms the token, and the token must not overlap another occurrence of itself.
        splits = {(token[:index], token[index:]) for index in range(1, len(token))}
        joinable = {(left, right) for left, right in splits if left in ranks and right in ranks}
        overlaps_itself = any(token.endswith(token[:size]) for size in range(1, len(token)))
        if not ignore_merges or not joinable <= pairs or overlaps_itself:
            raise UnsuitableError("merging the bytes of a token does not give the token")


def byte_alphabet() -> dict[str, int]:
    """Return the byte for which each character of a byte-level vocabulary stands: printable ones for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def _literal_tokens(added: list[dict[str, Any]], split_special_tokens: bool) -> dict[str, int]:
    """Return the ids of the added tokens if every one is matched exactly as written; else {}."""
    flags = ("lstrip", "rstrip", "single_word")
    contents = sorted(token["content"] for token in added)
    if (
        split_special_tokens
        or not all(contents)
        or any(token[flag] for token in added for flag in flags)
        or len({token["normalized"] for token in added}) > 1
        or any(second.startswith(first) for first, second in itertools.pairwise(contents))
    ):
        return {}
    return {token["content"]: token["id"] for token in added}


def _any_of(literals: list[str]) -> re.Pattern[str] | None:
    """Return a pattern that matches any of the literals; None if there are none."""
    literals = [literal for literal in literals if literal]
    return re.compile("|".join(map(re.escape, literals))) if literals else None
