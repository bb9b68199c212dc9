"""Text to token ids: exactly the tokenizer's own, in batches, and long documents in pieces."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llm.config.errors import UserError
from llm.data.held_out import Split
from llm.data.merges import MergeEngine
from llm.data.parts import Part
from llm.data.patterns import ODD_TEXTS, UnsuitableError
from llm.data.workers import map_in_threads, usable_cores

log = logging.getLogger(__name__)

# Characters. A batch keeps all cores busy; its encodings take some hundred bytes a token meanwhile.
BATCH_LENGTH = 4 << 20
LONG_DOCUMENT = 4 << 20
PIECE_LENGTH = 1 << 16

# How much of a long document is encoded whole and in pieces, to see whether that is the same.
_TRIAL_LENGTH = 1 << 20
_TRIAL_PIECE_LENGTH = 1 << 14
_SAMPLE_LENGTH = 1 << 14

# Characters. Less text than that is encoded before the faster engine is made and tried (about a second).
_WORTH_LENGTH = 1 << 20

_FEWEST_TRIAL_PIECES = 8

# Where few tokenizers join: behind a newline at the end of a line of text, in front of a word; or,
# as WikiText has them, in front of a space and a word. (Special tokens, which may swallow the space
# around them, begin with < or [ and end with > or ].) Each is tried before it is used.
_PLACES = (re.compile(r"(?<=[^\s>\]]\n)(?=\w)"), re.compile(r"(?<=\n)(?= [^\s<\[])"))


class Piece(NamedTuple):
    """What is encoded at once: a document or a piece of a long one."""

    split: Split
    text: str
    begins: bool
    ends: bool


class Encoder:
    """A tokenizer as a function from texts to ids, by the fastest engine that gives the same ids.

    That is tiktoken with the tokenizer's own vocabulary, else a fast tokenizer's engine without the
    Python objects around it, else the tokenizer's call. Which one is found out by the first texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.vocabulary_size = vocabulary_size(tokenizer)
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        self._merges: MergeEngine | None = None
        self._is_tried = self._backend is None
        self._is_merges_tried = self._backend is None
        self._is_place_tried = False
        self._place: re.Pattern[str] | None = None
        # The tokenizer's engine is set before each use, and is parallel itself.
        self._lock = threading.Lock()

    def encode(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, without special tokens around them: uint32 [number of tokens].

        Raises:
            UserError: the tokenizer gave an id beyond its vocabulary.
        """
        self._choose(texts)
        if self._merges is None:
            return self._from_tokenizers(texts)
        quick = self._merges.encode(texts)
        rest = iter(self._from_tokenizers([text for text, ids in zip(texts, quick, strict=True) if ids is None]))
        return [next(rest) if ids is None else ids for ids in quick]

    def encode_batches(
        self, batches: Iterable[list[Piece]], num_workers: int | None = None
    ) -> Iterator[tuple[list[Piece], list[NDArray[np.uint32]]]]:
        """Each batch with the ids of its pieces, in the order of the batches, a few batches ahead of their use.

        Args:
            batches: lists of pieces.
            num_workers: threads that encode, None: one for each core.

        Raises:
            UserError: the tokenizer gave an id beyond its vocabulary.
        """

        def encoded(batch: list[Piece]) -> tuple[list[Piece], list[NDArray[np.uint32]]]:
            return batch, self.encode([piece.text for piece in batch])

        return map_in_threads(encoded, batches, usable_cores() if num_workers is None else num_workers)

    def safe_place(self, text: str) -> re.Pattern[str] | None:
        """Where a long text can be cut so that the pieces give the ids of the whole.

        Tried once, on the beginning of the first long text; None if there is no such place.
        """
        if not self._is_place_tried:
            self._is_place_tried = True
            trial = text[:_TRIAL_LENGTH]
            whole = self.encode([trial])[0]
            for place in _PLACES:
                pieces = cut(trial, _TRIAL_PIECE_LENGTH, place)
                if len(pieces) >= _FEWEST_TRIAL_PIECES and np.array_equal(np.concatenate(self.encode(pieces)), whole):
                    self._place = place
                    break
        return self._place

    def _choose(self, texts: list[str]) -> None:
        """Finds out, once for each engine, whether it gives the tokenizer's ids."""
        with self._lock:
            if self._is_tried and (self._is_merges_tried or sum(map(len, texts)) < _WORTH_LENGTH):
                return
            sample = [*ODD_TEXTS, *(text[:_SAMPLE_LENGTH] for text in texts[:16])]
            expected = self._from_tokenizer(sample)
            if not self._is_tried:
                self._is_tried = True
                if not _are_equal(self._from_backend(sample), expected):
                    self._backend = None
                    self._is_merges_tried = True
            if not self._is_merges_tried and sum(map(len, texts)) >= _WORTH_LENGTH:
                self._is_merges_tried = True
                self._try_merges(sample, expected)

    def _try_merges(self, sample: list[str], expected: list[NDArray[np.uint32]]) -> None:
        assert self._backend is not None
        try:
            merges = MergeEngine(self._backend, split_special_tokens=self._tokenizer.split_special_tokens)
        except UnsuitableError as reason:
            log.debug("the tokenizer's own engine encodes: %s", reason)
            return
        found = merges.encode(sample)
        if _are_equal([due if ids is None else ids for ids, due in zip(found, expected, strict=True)], expected):
            # Its ids are all in the vocabulary: that is where they come from.
            self._merges = merges
        else:
            log.warning("tiktoken gives other ids than the tokenizer, whose own engine encodes instead")

    def _from_tokenizers(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        if not texts:
            return []
        with self._lock:
            found = self._from_tokenizer(texts) if self._backend is None else self._from_backend(texts)
        largest = max((int(ids.max()) for ids in found if ids.size), default=-1)
        if largest >= self.vocabulary_size:
            raise UserError(
                f"the tokenizer gives id {largest} but has {self.vocabulary_size} tokens;"
                " its files do not belong together: name another --tokenizer_name"
            )
        return found

    def _from_backend(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        assert self._backend is not None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = self._tokenizer.split_special_tokens
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _from_tokenizer(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        # Not verbose: a text longer than the model's context is no mistake here.
        found = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.array(ids, dtype=np.uint32) for ids in found["input_ids"]]


def _are_equal(found: list[NDArray[np.uint32]], expected: list[NDArray[np.uint32]]) -> bool:
    return all(map(np.array_equal, found, expected))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id, so that every id fits, also where a vocabulary has holes."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


@contextmanager
def encoding_threads(number: int | None) -> Iterator[None]:
    """Lets fast tokenizers use so many threads (None: one per core, or what the environment says).

    Their thread pool is made at its first use and keeps its size: in a process that has tokenized
    before, a number other than 1 changes nothing.
    """
    wanted = {"TOKENIZERS_PARALLELISM": "false" if number == 1 else "true"}
    if number is not None:
        wanted["RAYON_NUM_THREADS"] = str(number)
    elif "TOKENIZERS_PARALLELISM" in os.environ:
        wanted = {}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value
            elif name == "RAYON_NUM_THREADS":
                del os.environ[name]
        # TOKENIZERS_PARALLELISM stays set: unset, tokenizers warns in every process forked later.


def batches(parts: Iterable[tuple[Split, Part]], encoder: Encoder) -> Iterator[list[Piece]]:
    """Groups the text into lists of pieces worth encoding at once, a few megabytes each."""
    batch: list[Piece] = []
    length = 0
    for piece in pieces(parts, encoder):
        batch.append(piece)
        length += len(piece.text)
        if length >= BATCH_LENGTH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def pieces(parts: Iterable[tuple[Split, Part]], encoder: Encoder) -> Iterator[Piece]:
    """Documents whole, but long ones in pieces if the ids stay the same.

    The last piece of a document that goes on in another split has `ends` false.
    """
    document: _Document | None = None
    for split, part in parts:
        if document is not None and document.split != split:
            yield from document.close(ends=False)
            document = None
        if document is None:
            document = _Document(split, encoder)
        yield from document.add(part.text)
        if part.ends:
            yield from document.close(ends=True)
            document = None
    if document is not None:
        yield from document.close(ends=False)


class _Document:
    """The text of a document that is not encoded yet."""

    def __init__(self, split: Split, encoder: Encoder) -> None:
        self.split = split
        self._encoder = encoder
        self._texts: list[str] = []
        self._length = 0
        self._limit = LONG_DOCUMENT
        self._begins = True

    def add(self, text: str) -> Iterator[Piece]:
        """Takes more text; what has become long is given out, but for its last piece."""
        self._texts.append(text)
        self._length += len(text)
        if self._length < self._limit:
            return
        whole = "".join(self._texts)
        place = self._encoder.safe_place(whole)
        found = [whole] if place is None else cut(whole, PIECE_LENGTH, place)
        for head in found[:-1]:
            yield Piece(self.split, head, self._begins, ends=False)
            self._begins = False
        self._texts, self._length = found[-1:], len(found[-1])
        # Where nothing can be cut, joining again and again must not take quadratic time.
        self._limit = max(LONG_DOCUMENT, 2 * self._length)

    def close(self, *, ends: bool) -> Iterator[Piece]:
        """Gives out the last piece."""
        text = "".join(self._texts)
        if text:
            yield Piece(self.split, text, self._begins, ends)


def cut(text: str, length: int, place: re.Pattern[str]) -> list[str]:
    """Cuts a text at the first place after every `length` characters; nothing is lost."""
    found: list[str] = []
    start = 0
    while match := place.search(text, start + length):
        found.append(text[start : match.start()])
        start = match.start()
    return [*found, text[start:]]
