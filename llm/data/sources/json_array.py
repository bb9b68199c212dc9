"""Read a JSON array of any length one item at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from llm.config.errors import UserError

_SPACE = re.compile(r"[ \t\r\n]*")

# Characters. A literal, number or escape that the end of the buffer divides is not longer than this.
_LONGEST_TOKEN = 16

_ENDS_VALUE = tuple(", ]\t\r\n")


def iter_items(chunks: Iterable[str], name: str) -> Iterator[Any]:
    """Yield the items of the array whose text the chunks form.

    Args:
        chunks: the text of the array, divided anywhere.
        name: the text's name in messages.

    Raises:
        UserError: the JSON is broken; the message names the line.
    """
    buffer = _Buffer(chunks, name)
    buffer.expect("[")
    if buffer.peek() == "]":
        buffer.expect("]")
    else:
        yield buffer.read_value()
        while buffer.peek() == ",":
            buffer.expect(",")
            yield buffer.read_value()
        buffer.expect("]")
    if buffer.peek():
        raise buffer.error("text after the end of the array")


class _Buffer:
    """The part of the text that is in memory: at least the unread rest of the current item.

    Args:
        chunks: the text, divided anywhere.
        name: the text's name in messages.
    """

    def __init__(self, chunks: Iterable[str], name: str) -> None:
        self._chunks = iter(chunks)
        self._name = name
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._position = 0
        self._num_lines_before = 0
        self._is_at_end = False

    def peek(self) -> str:
        """Return the next character that is not white space, or '' at the end of the text."""
        while True:
            space = _SPACE.match(self._text, self._position)
            assert space is not None
            self._position = space.end()
            if self._position < len(self._text):
                return self._text[self._position]
            if self._is_at_end:
                return ""
            self._read_more()

    def expect(self, character: str) -> None:
        """Step over the next character, which must be the given one."""
        actual = self.peek()
        if actual != character:
            raise self.error(f"{character} expected, found {actual or 'the end of the file'}")
        self._position += 1

    def read_value(self) -> Any:
        """Return the next JSON value and step over it."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if self._is_at_end or not self._may_be_incomplete(error):
                    raise self.error(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from None
            else:
                # A number near the end of the buffer may be incomplete: 2 of 2.5, 1 of 1e-3.
                following = self._text[end : end + _LONGEST_TOKEN]
                if self._is_at_end or len(following) == _LONGEST_TOKEN or following[:1] in _ENDS_VALUE:
                    self._position = end
                    return value
            self._read_more()

    def error(self, reason: str, position: int | None = None) -> UserError:
        """Make the error that names the line of a position in the buffer (None: the current position)."""
        end = self._position if position is None else position
        line = self._num_lines_before + self._text.count("\n", 0, end) + 1
        return UserError(f"{self._name}: broken JSON at line {line} ({reason}); fix or remove it")

    def _may_be_incomplete(self, error: json.JSONDecodeError) -> bool:
        is_unterminated = error.msg.startswith("Unterminated string")
        return is_unterminated or error.pos >= len(self._text) - _LONGEST_TOKEN

    def _read_more(self) -> None:
        """Drop the text before the position and double the rest, so that a long item is parsed only a few times."""
        self._num_lines_before += self._text.count("\n", 0, self._position)
        rest = self._text[self._position :]
        parts = [rest]
        num_missing = len(rest) + 1
        for chunk in self._chunks:
            parts.append(chunk)
            num_missing -= len(chunk)
            if num_missing <= 0:
                break
        else:
            self._is_at_end = True
        self._text = "".join(parts)
        self._position = 0
