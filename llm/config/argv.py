"""Splitting of a command line into flags and their words, before the values are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm.config.abbreviations import BUILT_IN, resolve
from llm.config.flags import FALSE_WORDS, TRUE_WORDS, Flag

_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|-inf|-nan", re.IGNORECASE)


@dataclass(frozen=True)
class ParsedFlag:
    """One flag of a command line, or plain words that belong to no flag.

    Attributes:
        word: the flag as written, such as `--kfac-damping`; "" for a plain word; "--" for the words after `--`,
            which are all plain.
        names: the options that the flag may mean: exactly one, unless the flag is unknown or ambiguous.
        values: the words that belong to the flag.
        joined: whether it was written as `--flag=value`.
    """

    word: str
    names: tuple[str, ...]
    values: tuple[str, ...]
    joined: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the values are words that belong to no flag."""
        return self.word in ("", "--")


def parse_argv(argv: Sequence[str], flags: Mapping[str, Flag]) -> list[ParsedFlag]:
    """Return the flags of a command line in order, each with its words.

    A flag takes one word. A flag of a tuple takes all words up to the next flag. A switch takes a word only if
    that word is true or false. A flag whose value is optional takes one word if there is one. An unknown flag
    takes all words up to the next flag, so that one misspelling is one mistake.

    Args:
        argv: the words after the name of the program.
        flags: the options of the command by name.
    """
    parsed: list[ParsedFlag] = []
    known = (*flags, *BUILT_IN)
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            parsed.append(ParsedFlag("--", (), tuple(rest)))
            break
        if not _is_flag(word):
            parsed.append(ParsedFlag("", (), (word,)))
            continue
        spelling, equals, value = word.partition("=")
        names: tuple[str, ...] = ("help",) if spelling == "-h" else ()
        if spelling.startswith("--"):
            names = tuple(resolve(spelling[2:], known))
        if equals:
            parsed.append(ParsedFlag(spelling, names, (value,), joined=True))
        else:
            num_words = _count_words(names, rest, flags)
            parsed.append(ParsedFlag(spelling, names, tuple(rest[:num_words])))
            del rest[:num_words]
    return parsed


def _count_words(names: tuple[str, ...], rest: Sequence[str], flags: Mapping[str, Flag]) -> int:
    """Return how many of the words that follow a flag belong to it."""
    num_until_flag = next((i for i, word in enumerate(rest) if _is_flag(word)), len(rest))
    if names in (("help",), ("version",)):
        return 0
    if names == ("config",):
        return min(num_until_flag, 1)
    flag = flags.get(names[0]) if len(names) == 1 else None
    if flag is None or flag.takes_many:
        return num_until_flag
    if flag.is_switch and num_until_flag and rest[0].lower() not in TRUE_WORDS + FALSE_WORDS:
        return 0
    return min(num_until_flag, 1)


def _is_flag(word: str) -> bool:
    """Whether a word is a flag and not a value: `-`, negative numbers and texts with blanks are values."""
    if not word.startswith("-") or word == "-" or _NUMBER.fullmatch(word):
        return False
    return " " not in word.partition("=")[0]
