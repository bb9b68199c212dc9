"""Text to token ids: exactly the tokenizer's own, in batches, and long documents in pieces."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llm.config.errors import UserError
from llm.data.held_out import Split
from llm.data.parts import Part

# Characters. A batch keeps all cores busy; its encodings take some hundred bytes a token meanwhile.
BATCH_LENGTH = 4 << 20
LONG_DOCUMENT = 4 << 20
PIECE_LENGTH = 1 << 16

# How much of a long document is encoded whole and in pieces, to see whether that is the same.
_TRIAL_LENGTH = 1 << 20
_TRIAL_PIECE_LENGTH = 1 << 14
_SAMPLE_LENGTH = 1 << 14

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
    """A tokenizer as a function from texts to ids.

    A fast tokenizer's own engine is called without the Python objects around it, where that gives
    the same ids on a sample of the first texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.vocabulary_size = vocabulary_size(tokenizer)
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        self._is_tried = self._backend is None
        self._is_place_tried = False
        self._place: re.Pattern[str] | None = None

    def encode(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, without special tokens around them: uint32 [number of tokens].

        Raises:
            UserError: the tokenizer gave an id beyond its vocabulary.
        """
        if not self._is_tried:
            self._is_tried = True
            sample = [text[:_SAMPLE_LENGTH] for text in texts[:16]]
            if self._from_backend(sample) != self._from_tokenizer(sample):
                self._backend = None
        found = self._from_tokenizer(texts) if self._backend is None else self._from_backend(texts)
        return [self._checked(ids) for ids in found]

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

    def _from_backend(self, texts: list[str]) -> list[list[int]]:
        assert self._backend is not None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = self._tokenizer.split_special_tokens
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _from_tokenizer(self, texts: list[str]) -> list[list[int]]:
        # Not verbose: a text longer than the model's context is no mistake here.
        found = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = found["input_ids"]
        return ids

    def _checked(self, ids: list[int]) -> NDArray[np.uint32]:
        found = np.array(ids, dtype=np.uint32)
        if found.size and int(found.max()) >= self.vocabulary_size:
            raise UserError(
                f"the tokenizer gives id {found.max()} but has {self.vocabulary_size} tokens;"
                " its files do not belong together: name another --tokenizer_name"
            )
        return found


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
