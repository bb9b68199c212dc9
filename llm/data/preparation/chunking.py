"""Divide long documents into pieces with the ids of the whole document, so that no text has to fit in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import AddedToken

from llm.config.errors import UserError
from llm.data.sources.documents import Piece, Split, TextChunk
from llm.tokenization.encoder import Encoder

# Characters. Encoding a batch takes some hundred bytes a token; small batches let the processes finish more evenly.
BATCH_CHARS = 1 << 20
LONG_DOCUMENT_CHARS = 4 << 20
PIECE_CHARS = 1 << 16

# Characters of the longest text that is encoded whole because it has no boundary: it takes two gigabytes.
LONGEST_PIECE_CHARS = 1 << 25

# Characters of a long document that are encoded both whole and in pieces, to compare the ids.
_TRIAL_CHARS = 1 << 18
_TRIAL_PIECE_CHARS = 1 << 12
_FEWEST_TRIAL_PIECES = 8

# Boundaries that few tokenizers join across: after the newline that ends a line of text and before a word; or, as in
# WikiText, before a space and a word. (Special tokens may swallow the space around them. They begin with < or [ and
# end with > or ].)
_BETWEEN_LINES = (r"(?<=[^\s>\]]\n)(?=\w)", r"(?<=\n)(?= [^\s<\[])")

# The same inside a line: before a space and a letter; in scripts without spaces, before the sign that ends a sentence
# or a clause. Used only if the tokenizer splits at all of them.
_STOPS = "。！？，、।؟"  # noqa: RUF001
_INSIDE_LINES = (r"(?<=[^\s>\]])(?= [^\W\d_])", rf"(?<=[^\W_])(?=[{_STOPS}])")


def _anywhere(added_tokens: list[AddedToken]) -> str:
    """Return a pattern for the boundary between any two characters that no added token can span.

    An added token spans its own characters, and the white space around it if the token strips it.
    """
    longer = [token for token in added_tokens if len(token.content) > 1 or token.lstrip or token.rstrip]
    letters = "".join(map(re.escape, sorted({letter for token in longer for letter in token.content})))
    if any(token.lstrip or token.rstrip for token in longer):
        letters += r"\s"
    return rf"(?s:(?<=[^{letters}])(?=.)|(?<=.)(?=[^{letters}]))" if letters else r"(?s:(?<=.)(?=.))"


class Chunker:
    """Divides a text into pieces that give the ids of the whole text.

    A pattern of boundaries is used once it has passed a trial on a part of the text. All patterns that passed are used
    together. Which patterns pass depends only on the text and the tokenizer.

    Args:
        encoder: encodes the trials, and tells what its tokens can span.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._untried: list[str] = []
        if encoder.has_only_character_tokens:
            self._untried.append(_anywhere(encoder.added_tokens))
        else:
            if not any(map(_spans_line_start, encoder.added_tokens)):
                self._untried += _BETWEEN_LINES
            if not any(map(_spans_boundary_in_line, encoder.added_tokens)):
                self._untried += _INSIDE_LINES
        self._passed: list[str] = []
        self._boundary: re.Pattern[str] | None = None

    def split(self, text: str) -> list[str]:
        """Divide a text at the first boundary after every `PIECE_CHARS` characters.

        Returns:
            The pieces, which together are the text. The last piece has no boundary after `PIECE_CHARS` characters.
        """
        pieces = [text] if self._boundary is None else split_text(text, PIECE_CHARS, self._boundary)
        if self._untried and len(pieces[-1]) >= LONG_DOCUMENT_CHARS // 2 and self._try_patterns(pieces[-1]):
            assert self._boundary is not None
            pieces[-1:] = split_text(pieces[-1], PIECE_CHARS, self._boundary)
        return pieces

    def _try_patterns(self, text: str) -> bool:
        """Try the patterns that match the end of the text often enough; return whether one of them passed."""
        self._encoder.select_backend([text])
        text = text[-_TRIAL_CHARS:]
        expected = self._encoder.encode([text])[0]
        passed = []
        for pattern in [*self._untried]:
            boundary = re.compile(pattern)
            pieces = split_text(text, _TRIAL_PIECE_CHARS, boundary)
            if len(pieces) < _FEWEST_TRIAL_PIECES:
                continue
            self._untried.remove(pattern)
            if not self._is_safe(pattern, text):
                continue
            if np.array_equal(np.concatenate(self._encoder.encode(pieces)), expected):
                passed.append(pattern)
        if passed:
            self._passed += passed
            self._boundary = re.compile("|".join(self._passed))
        return bool(passed)

    def _is_safe(self, pattern: str, text: str) -> bool:
        """Return whether the tokenizer cannot join across the pattern's boundaries.

        Equal ids in a trial do not prove this for the rest of the text.
        """
        if self._encoder.has_only_character_tokens or self._encoder.splits_at(re.compile(pattern), text):
            return True
        return pattern in _BETWEEN_LINES and not self._encoder.has_tokens_across_lines


def _spans_line_start(token: AddedToken) -> bool:
    """Return whether an added token may span the beginning of a line."""
    return "\n" in token.content[:-1] or _strips_without_brackets(token)


def _strips_without_brackets(token: AddedToken) -> bool:
    """Return whether an added token strips white space around it, without the brackets that boundaries avoid."""
    is_bracketed = token.content[:1] in ("<", "[") and token.content[-1:] in (">", "]")
    return (token.lstrip or token.rstrip) and not is_bracketed


def _spans_boundary_in_line(token: AddedToken) -> bool:
    """Return whether an added token may span a boundary inside a line."""
    return re.search(rf"\s|.[{_STOPS}]", token.content) is not None or _strips_without_brackets(token)


def batch_pieces(
    chunks: Iterable[tuple[Split, TextChunk]], encoder: Encoder, name: str = "the text"
) -> Iterator[list[Piece]]:
    """Group the text into batches of pieces to encode together, about `BATCH_CHARS` characters each.

    Args:
        chunks: the text.
        encoder: tells where the text can be divided.
        name: the text's name in messages.

    Raises:
        UserError: a document is very long and has no boundary.
    """
    batch: list[Piece] = []
    length = 0
    for piece in split_documents(chunks, encoder, name):
        batch.append(piece)
        length += len(piece.text)
        if length >= BATCH_CHARS:
            yield batch
            batch = []
            length = 0
    if batch:
        yield batch


def split_documents(
    chunks: Iterable[tuple[Split, TextChunk]], encoder: Encoder, name: str = "the text"
) -> Iterator[Piece]:
    """Yield short documents whole, and long documents in pieces if the ids stay the same.

    The last piece of a document that continues in another split has `ends` false.

    Args:
        chunks: the text.
        encoder: tells where the text can be divided.
        name: the text's name in messages.

    Raises:
        UserError: a document is very long and has no boundary.
    """
    chunker = Chunker(encoder)
    document: _Document | None = None
    number = 1
    for split, chunk in chunks:
        if document is not None and document.split != split:
            yield from document.close(ends=False)
            document = None
        if document is None:
            document = _Document(split, chunker, f"{name}: document {number}")
        yield from document.add(chunk.text)
        if chunk.ends:
            yield from document.close(ends=True)
            document = None
            number += 1
    if document is not None:
        yield from document.close(ends=False)


class _Document:
    """The text of a document that has not been yielded as pieces yet.

    Args:
        split: the split of the document's pieces.
        chunker: divides the text.
        name: the document's name in messages.
    """

    def __init__(self, split: Split, chunker: Chunker, name: str) -> None:
        self.split = split
        self._chunker = chunker
        self._name = name
        self._texts: list[str] = []
        self._length = 0
        self._limit = LONG_DOCUMENT_CHARS
        self._begins = True

    def add(self, text: str) -> Iterator[Piece]:
        """Add text; if the document has become long, yield all its pieces but the last."""
        self._texts.append(text)
        self._length += len(text)
        if self._length < self._limit:
            return
        pieces = self._chunker.split("".join(self._texts))
        for piece in pieces[:-1]:
            yield Piece(self.split, piece, self._begins, ends=False)
            self._begins = False
        self._texts = pieces[-1:]
        self._length = len(pieces[-1])
        if self._length >= LONGEST_PIECE_CHARS:
            raise UserError(
                f"{self._name} has {self._length / 1e6:.0f} million characters without a place where the tokenizer"
                " surely splits; break it into lines or rows, or choose another --tokenizer_name"
            )
        # Doubling the limit keeps the time of joining linear in a text that cannot be divided.
        self._limit = min(max(LONG_DOCUMENT_CHARS, 2 * self._length), LONGEST_PIECE_CHARS)

    def close(self, *, ends: bool) -> Iterator[Piece]:
        """Yield the last piece."""
        text = "".join(self._texts)
        if text:
            yield Piece(self.split, text, self._begins, ends)


def split_text(text: str, min_length: int, boundary: re.Pattern[str]) -> list[str]:
    """Divide a text at the first boundary after every `min_length` characters.

    Args:
        text: the text.
        min_length: characters that every part but the last has at least.
        boundary: matches the empty string before each character that a part may begin with.

    Returns:
        The parts, which together are the text.
    """
    parts: list[str] = []
    start = 0
    while match := boundary.search(text, start + min_length):
        parts.append(text[start : match.start()])
        start = match.start()
    return [*parts, text[start:]]
