"""Long documents in pieces that give the ids of the whole, so that no text must fit in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import AddedToken

from llm.config.errors import UserError
from llm.data.sources.documents import Piece, Split, TextChunk
from llm.tokenization.encoder import Encoder

# Characters. A batch's encodings take some hundred bytes a token meanwhile; smaller ones end more evenly.
BATCH_CHARS = 1 << 20
LONG_DOCUMENT_CHARS = 4 << 20
PIECE_CHARS = 1 << 16

# Characters that would be encoded whole because no place to cut was found: they take two gigabytes.
LONGEST_PIECE_CHARS = 1 << 25

# How much of a long document is encoded whole and in pieces, to see whether that is the same.
_TRIAL_LENGTH = 1 << 18
_TRIAL_PIECE_LENGTH = 1 << 12
_FEWEST_TRIAL_PIECES = 8

# Where few tokenizers join: behind a newline at the end of a line of text, in front of a word; or, as
# WikiText has them, in front of a space and a word. (Special tokens, which may swallow the space around
# them, begin with < or [ and end with > or ].)
_BETWEEN_LINES = (r"(?<=[^\s>\]]\n)(?=\w)", r"(?<=\n)(?= [^\s<\[])")

# The same inside a line: in front of a space and a letter; where words have no spaces, in front of the
# sign that ends a sentence or a part of it. Only where the tokenizer splits at all of them.
_STOPS = "。！？，、।؟"  # noqa: RUF001
_INSIDE_LINES = (r"(?<=[^\s>\]])(?= [^\W\d_])", rf"(?<=[^\W_])(?=[{_STOPS}])")


def _anywhere(added_tokens: list[AddedToken]) -> str:
    """Between any two characters but where both may be of an added token, or of the space that one swallows."""
    longer = [token for token in added_tokens if len(token.content) > 1 or token.lstrip or token.rstrip]
    letters = "".join(map(re.escape, sorted({letter for token in longer for letter in token.content})))
    if any(token.lstrip or token.rstrip for token in longer):
        letters += r"\s"
    return rf"(?s:(?<=[^{letters}])(?=.)|(?<=.)(?=[^{letters}]))" if letters else r"(?s:(?<=.)(?=.))"


class Chunker:
    """Finds where a text can be cut so that the pieces give the ids of the whole.

    A kind of place is used once it was tried on a stretch of the text; the kinds that pass are used
    together. Which they are depends on nothing but the text and the tokenizer.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._untried = [_anywhere(encoder.added_tokens)] if encoder.joins_nothing else []
        if not encoder.joins_nothing and not any(map(_reaches_over_lines, encoder.added_tokens)):
            self._untried += _BETWEEN_LINES
        if not encoder.joins_nothing and _is_plain(encoder.added_tokens):
            self._untried += _INSIDE_LINES
        self._used: list[str] = []
        self._place: re.Pattern[str] | None = None

    def split(self, text: str) -> list[str]:
        """Pieces of a text, at the first place after every so many characters; the last has no place in it."""
        found = [text] if self._place is None else split_text(text, PIECE_CHARS, self._place)
        if self._untried and len(found[-1]) >= LONG_DOCUMENT_CHARS // 2 and self._try(found[-1]):
            assert self._place is not None
            found[-1:] = split_text(found[-1], PIECE_CHARS, self._place)
        return found

    def _try(self, text: str) -> bool:
        """Tries the kinds of places that the end of the text has; whether one of them passed."""
        self._encoder.choose([text])
        text = text[-_TRIAL_LENGTH:]
        whole = self._encoder.encode([text])[0]
        passed = []
        for place in [*self._untried]:
            pieces = split_text(text, _TRIAL_PIECE_LENGTH, re.compile(place))
            if len(pieces) < _FEWEST_TRIAL_PIECES:
                continue
            self._untried.remove(place)
            # That the trial has no token over a place says nothing of the rest: it must be so for a reason.
            is_sound = self._encoder.joins_nothing or self._encoder.splits_at(re.compile(place), text)
            is_sound = is_sound or (place in _BETWEEN_LINES and not self._encoder.joins_lines)
            if is_sound and np.array_equal(np.concatenate(self._encoder.encode(pieces)), whole):
                passed.append(place)
        if passed:
            self._used += passed
            self._place = re.compile("|".join(self._used))
        return bool(passed)


def _reaches_over_lines(token: AddedToken) -> bool:
    """Whether a token that is found before the text is split may reach over the beginning of a line."""
    return "\n" in token.content[:-1] or _swallows_unseen(token)


def _swallows_unseen(token: AddedToken) -> bool:
    """Whether it takes the space around it, and has none of the brackets that no place stands beside."""
    is_bracketed = token.content[:1] in ("<", "[") and token.content[-1:] in (">", "]")
    return (token.lstrip or token.rstrip) and not is_bracketed


def _is_plain(added_tokens: list[AddedToken]) -> bool:
    """Whether no token that is found before the text is split reaches over a place inside a line."""
    return not any(re.search(rf"\s|.[{_STOPS}]", token.content) or _swallows_unseen(token) for token in added_tokens)


def batch_pieces(
    parts: Iterable[tuple[Split, TextChunk]], encoder: Encoder, name: str = "the text"
) -> Iterator[list[Piece]]:
    """Groups the text into lists of pieces worth encoding at once, about a megabyte each.

    Args:
        parts: the text.
        encoder: tells where it can be cut.
        name: of the text, for messages.

    Raises:
        UserError: a document is very long and has no place to cut it at.
    """
    batch: list[Piece] = []
    length = 0
    for piece in split_documents(parts, encoder, name):
        batch.append(piece)
        length += len(piece.text)
        if length >= BATCH_CHARS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def split_documents(
    parts: Iterable[tuple[Split, TextChunk]], encoder: Encoder, name: str = "the text"
) -> Iterator[Piece]:
    """Documents whole, but long ones in pieces if the ids stay the same.

    The last piece of a document that goes on in another split has `ends` false.
    """
    cutter = Chunker(encoder)
    document: _Document | None = None
    number = 1
    for split, part in parts:
        if document is not None and document.split != split:
            yield from document.close(ends=False)
            document = None
        if document is None:
            document = _Document(split, cutter, f"{name}: document {number}")
        yield from document.add(part.text)
        if part.ends:
            yield from document.close(ends=True)
            document = None
            number += 1
    if document is not None:
        yield from document.close(ends=False)


class _Document:
    """The text of a document that is not encoded yet."""

    def __init__(self, split: Split, cutter: Chunker, name: str) -> None:
        self.split = split
        self._cutter = cutter
        self._name = name
        self._texts: list[str] = []
        self._length = 0
        self._limit = LONG_DOCUMENT_CHARS
        self._begins = True

    def add(self, text: str) -> Iterator[Piece]:
        """Takes more text; what has become long is given out, but for its last piece."""
        self._texts.append(text)
        self._length += len(text)
        if self._length < self._limit:
            return
        found = self._cutter.split("".join(self._texts))
        for head in found[:-1]:
            yield Piece(self.split, head, self._begins, ends=False)
            self._begins = False
        self._texts, self._length = found[-1:], len(found[-1])
        if self._length >= LONGEST_PIECE_CHARS:
            raise UserError(
                f"{self._name} has {self._length / 1e6:.0f} million characters without a place where the tokenizer"
                " surely splits; break it into lines or rows, or choose another --tokenizer_name"
            )
        # Where nothing can be cut, joining again and again must not take quadratic time.
        self._limit = min(max(LONG_DOCUMENT_CHARS, 2 * self._length), LONGEST_PIECE_CHARS)

    def close(self, *, ends: bool) -> Iterator[Piece]:
        """Gives out the last piece."""
        text = "".join(self._texts)
        if text:
            yield Piece(self.split, text, self._begins, ends)


def split_text(text: str, length: int, place: re.Pattern[str]) -> list[str]:
    """Cuts a text at the first place after every `length` characters; nothing is lost."""
    found: list[str] = []
    start = 0
    while match := place.search(text, start + length):
        found.append(text[start : match.start()])
        start = match.start()
    return [*found, text[start:]]
