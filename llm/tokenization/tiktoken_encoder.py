"""The faster encoder: a byte-level BPE tokenizer's own vocabulary in tiktoken, where the ids are the same."""

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

# Characters encoded by one call: what is being worked on fits in the processor's cache.
_CHUNK_LENGTH = 1 << 16

# Characters. tiktoken's regex engine gives up on white space somewhere beyond 300,000 of them in a row.
_WHITE_SPACE_LENGTH = 1 << 16

# A character that no text should have (it is reserved, for ever): stands between texts encoded by one
# call. tiktoken knows it as a special token, so that no word reaches over it.
_BETWEEN = "\ufdd0"


class Vocabulary(NamedTuple):
    """Byte strings in the order of their merges.

    Attributes:
        ranks: of the 256 bytes, then of what each merge makes.
        ids: uint32 [number of ranks], the tokenizer's id of each rank.
    """

    ranks: dict[bytes, int]
    ids: NDArray[np.uint32]


class TiktokenEncoder:
    """Texts to ids by tiktoken. It can be pickled, and costs a process that uses it few imports.

    Args:
        backend: the tokenizer's own engine.
        split_special_tokens: whether added tokens are taken for text where they occur in it.
        workers: processes that may help to make the engine; what they share is not used.

    Raises:
        UnsuitableError: tiktoken would not give the ids of this tokenizer, or is not installed.
    """

    def __init__(self, backend: Tokenizer, *, split_special_tokens: bool, workers: WorkerPool | None = None) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise UnsuitableError("tiktoken is not installed") from error
        facts = json.loads(backend.to_str())
        if facts["normalizer"] is not None:
            raise UnsuitableError("the tokenizer changes the text before it splits it")
        self._pattern = read_pattern(facts["pre_tokenizer"])
        added = facts["added_tokens"]
        # Both take a good part of a second: at the same time, where somebody can help.
        differing = None if workers is None else workers.submit(_differing_characters, self._pattern)
        vocabulary = read_vocabulary(facts["model"], {token["content"] for token in added})
        self._plain = _plain_tokens(added, split_special_tokens)
        self._odd = [token["content"] for token in added if token["content"] not in self._plain]
        if any(_BETWEEN in token["content"] for token in added):
            raise UnsuitableError("an added token has a reserved character")
        first = len(vocabulary.ranks)
        special = {content: first + number for number, content in enumerate([*self._plain, _BETWEEN])}
        self._between = special[_BETWEEN]
        ids = np.concatenate([vocabulary.ids, np.array([*self._plain.values(), 0], dtype=np.uint32)])
        # GPT-2's ids are the ranks: nothing to look up.
        self._ids = None if np.array_equal(ids[:first], np.arange(first)) and not self._plain else ids
        self._sizes = np.array([len(token) for token in vocabulary.ranks] + [len(token.encode()) for token in special])
        self._special = frozenset(special)
        self._awkward_ascii = _any_of(self._odd)
        differing_here = differing_characters(self._pattern) if differing is None else differing.result()
        self._awkward = _any_of([*self._odd, _BETWEEN, *differing_here])
        self._encoding = tiktoken.Encoding(
            "llm", pat_str=self._pattern, mergeable_ranks=vocabulary.ranks, special_tokens=special
        )

    def encode(self, texts: list[str]) -> list[NDArray[np.uint32] | None]:
        """The ids of each text: uint32 [number of tokens]; None for a text that the tokenizer must encode itself."""
        found: list[NDArray[np.uint32] | None] = [None] * len(texts)
        for chunk in self._chunks(texts):
            joined = _BETWEEN.join(texts[place] for place in chunk)
            ranks = self._encoding.encode_to_numpy(joined, allowed_special=self._special, disallowed_special=())
            if self._pattern != GPT2_PATTERN and int(self._sizes[ranks].sum()) != len(joined.encode()):
                continue  # The pattern does not match every character.
            ids = ranks if self._ids is None else self._ids[ranks]
            start = 0
            ends = np.flatnonzero(ranks == self._between).tolist() if len(chunk) > 1 else []
            for place, end in zip(chunk, [*ends, len(ids)], strict=True):
                found[place] = ids[start:end]
                start = end + 1
        return found

    def _chunks(self, texts: list[str]) -> Iterator[list[int]]:
        """Places of texts that tiktoken may encode, as many together as are worth one call."""
        chunk: list[int] = []
        length = 0
        for place, text in enumerate(texts):
            if self._is_awkward(text):
                continue
            chunk.append(place)
            length += len(text)
            if length >= _CHUNK_LENGTH:
                yield chunk
                chunk, length = [], 0
        if chunk:
            yield chunk

    def _is_awkward(self, text: str) -> bool:
        pattern = self._awkward_ascii if text.isascii() else self._awkward
        if pattern is not None and pattern.search(text) is not None:
            return True
        # A run of twice that length has a stretch that begins at a multiple of it.
        starts = range(0, len(text) - _WHITE_SPACE_LENGTH, _WHITE_SPACE_LENGTH)
        return any(text[start : start + _WHITE_SPACE_LENGTH].isspace() for start in starts)


def encode_packed(engine: TiktokenEncoder, texts: list[str], dtype: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """What `engine.encode` gives, as two arrays, for the way between processes.

    Args:
        engine: encodes.
        texts: what to encode.
        dtype: of the ids; holds every id of the vocabulary.

    Returns:
        The number of ids of each text, -1 for None: int64 [number of texts]; and all ids, one text's
        behind the other's.
    """
    found = engine.encode(texts)
    lengths = np.array([-1 if ids is None else len(ids) for ids in found], dtype=np.int64)
    some = [ids for ids in found if ids is not None]
    return lengths, np.concatenate(some, dtype=dtype, casting="same_kind") if some else np.array([], dtype=dtype)


def unpack(lengths: NDArray[np.int64], ids: NDArray[Any]) -> list[NDArray[Any] | None]:
    """The ids of each text again, None where there are none, as views of what `encode_packed` gave."""
    found: list[NDArray[Any] | None] = []
    start = 0
    for length in lengths.tolist():
        found.append(None if length < 0 else ids[start : start + length])
        start += max(length, 0)
    return found


def _differing_characters(_: object, pattern: str) -> str:
    return differing_characters(pattern)


def read_vocabulary(model: dict[str, Any], added: set[str]) -> Vocabulary:
    """The vocabulary of a byte-level BPE whose merges tiktoken does in the same order.

    tiktoken joins any two neighbours whose union is a token, lowest rank first; BPE joins the pairs of
    its list, first of the list first. Both do the same if every token, alone, is built by the list's
    merges from parts earlier in the list: where two neighbours' union is a token, and nothing of lower
    rank is left to join, they are the two parts that the list joins last.

    Args:
        model: that section of a tokenizer.json.
        added: tokens that are found before the text is split into words.

    Raises:
        UnsuitableError: it is none.
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
    order = dict(sorted(alphabet.items(), key=lambda pair: pair[1]))
    for left, right in merges:
        token = left + right
        if left not in order or right not in order:
            raise UnsuitableError("a merge joins what comes later")
        if order.setdefault(token, len(order)) != len(order) - 1:
            raise UnsuitableError("the merges of one token lie apart")
    if not order.keys() <= vocab.keys():
        raise UnsuitableError("a merge makes what is no token")
    whole = bool(model.get("ignore_merges"))
    if whole and not vocab.keys() <= order.keys() | added:
        raise UnsuitableError("a token cannot be reached by merges")
    _check_merges(vocab, order, merges, whole)
    ids = np.array([vocab[token] for token in order], dtype=np.uint32)
    # Characters 0 to 255 have these bytes in Latin-1.
    table = str.maketrans({character: chr(byte) for character, byte in alphabet.items()})
    return Vocabulary({token.translate(table).encode("latin-1"): rank for token, rank in order.items()}, ids)


def _check_merges(
    vocab: dict[str, int], order: dict[str, int], merges: list[tuple[str, ...]], whole_words_first: bool
) -> None:
    """Sees whether every token is what the merges make of its bytes."""
    plain = Tokenizer(models.BPE(vocab=vocab, merges=[(left, right) for left, right in merges], cache_capacity=0))
    tokens = list(order)
    # All of them as words of one text: quicker than one by one, and nearly always all there is to see.
    plain.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if len(plain.encode_batch_fast([" ".join(tokens)], add_special_tokens=False)[0]) == len(tokens):
        return
    pairs = set(merges)
    for token, encoding in zip(tokens, plain.encode_batch_fast(tokens, add_special_tokens=False), strict=True):
        if len(encoding) == 1:
            continue
        # Some vocabularies give a word its token whatever the merges say; then each way to join it must
        # be in the list, and none may overlap another.
        splits = {(token[:place], token[place:]) for place in range(1, len(token))}
        known = {(left, right) for left, right in splits if left in order and right in order}
        overlaps = any(token.endswith(token[:size]) for size in range(1, len(token)))
        if not whole_words_first or not known <= pairs or overlaps:
            raise UnsuitableError("a token is not what the merges make of its bytes")


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary: printable ones for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def _plain_tokens(added: list[dict[str, Any]], split_special_tokens: bool) -> dict[str, int]:
    """The added tokens that are found in a text just as they are written, with their ids."""
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
    literals = [literal for literal in literals if literal]
    return re.compile("|".join(map(re.escape, literals))) if literals else None
