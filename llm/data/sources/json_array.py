"""A JSON array of any length, an item at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from llm.config.errors import UserError

_SPACE = re.compile(r"[ \t\r\n]*")

# No literal, number or escape that the end of the read text cuts in two is longer than this.
_LONGEST_CUT = 16

_ENDS_VALUE = tuple(", ]\t\r\n")


def iter_items(chunks: Iterable[str], name: str) -> Iterator[Any]:
    """The items of the array that the chunks hold together.

    Args:
        chunks: the text of the array, cut anywhere.
        name: what messages call the text.

    Raises:
        UserError: broken JSON; names the line.
    """
    text = _Window(chunks, name)
    text.take("[")
    if text.peek() == "]":
        text.take("]")
    else:
        yield text.value()
        while text.peek() == ",":
            text.take(",")
            yield text.value()
        text.take("]")
    if text.peek():
        raise text.broken("text after the end of the array")


class _Window:
    """The part of the text that is in memory: from the item being read on."""

    def __init__(self, chunks: Iterable[str], name: str) -> None:
        self._chunks = iter(chunks)
        self._name = name
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._lines_before = 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is not space, or '' at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read_on()

    def take(self, character: str) -> None:
        """Steps over a character that has to come next."""
        found = self.peek()
        if found != character:
            raise self.broken(f"{character} expected, found {found or 'the end of the file'}")
        self._at += 1

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_be_cut(error):
                    raise self.broken(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.broken(str(error)) from None
            else:
                # A number near the end of what was read may go on: 2 of 2.5, 1 of 1e-3.
                follows = self._text[end : end + _LONGEST_CUT]
                if self._ended or len(follows) == _LONGEST_CUT or follows[:1] in _ENDS_VALUE:
                    self._at = end
                    return value
            self._read_on()

    def broken(self, reason: str, position: int | None = None) -> UserError:
        """The refusal that names the line of a position in the window (None: where it stands)."""
        end = self._at if position is None else position
        line = self._lines_before + self._text.count("\n", 0, end) + 1
        return UserError(f"{self._name}: broken JSON at line {line} ({reason}); mend or remove it")

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        unterminated = error.msg.startswith("Unterminated string")
        return unterminated or error.pos >= len(self._text) - _LONGEST_CUT

    def _read_on(self) -> None:
        """Forgets what was read and doubles the rest, so that a long item is tried few times."""
        self._lines_before += self._text.count("\n", 0, self._at)
        rest = self._text[self._at :]
        pieces, wanted = [rest], len(rest) + 1
        for chunk in self._chunks:
            pieces.append(chunk)
            wanted -= len(chunk)
            if wanted <= 0:
                break
        else:
            self._ended = True
        self._text = "".join(pieces)
        self._at = 0
