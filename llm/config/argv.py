"""A command line cut into flags and their words, before anything is known about their values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm.config.abbreviations import BUILT_IN, resolve
from llm.config.flags import FALSE_WORDS, TRUE_WORDS, Flag

NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|-inf|-nan", re.IGNORECASE)


@dataclass(frozen=True)
class ParsedFlag:
    """One flag as it was given, or plain words that belong to no flag.

    Attributes:
        word: the flag as written, such as `--kfac-damping`; "" for a plain word, and "--" before
            words that are plain whatever they look like.
        names: the options that it may mean: exactly one unless it is a mistake.
        values: the words that belong to it.
        joined: whether it was written as `--flag=value`.
    """

    word: str
    names: tuple[str, ...]
    values: tuple[str, ...]
    joined: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether these are words that belong to no flag."""
        return self.word in ("", "--")


def parse_argv(argv: Sequence[str], flags: Mapping[str, Flag]) -> list[ParsedFlag]:
    """The flags of a command line in order, each with its words.

    A flag takes one word; a tuple takes all up to the next flag; a switch takes a word only if that
    is a truth value; what may stand bare takes one if there is one. An unknown flag takes all, so
    that one misspelling is one mistake.
    """
    given: list[ParsedFlag] = []
    known = (*flags, *BUILT_IN)
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            given.append(ParsedFlag("--", (), tuple(rest)))
            break
        if not _is_flag(word):
            given.append(ParsedFlag("", (), (word,)))
            continue
        spelling, equals, value = word.partition("=")
        names: tuple[str, ...] = ("help",) if spelling == "-h" else ()
        if spelling.startswith("--"):
            names = tuple(resolve(spelling[2:], known))
        if equals:
            given.append(ParsedFlag(spelling, names, (value,), joined=True))
        else:
            count = _count_words(names, rest, flags)
            given.append(ParsedFlag(spelling, names, tuple(rest[:count])))
            del rest[:count]
    return given


def _count_words(names: tuple[str, ...], rest: Sequence[str], flags: Mapping[str, Flag]) -> int:
    """How many of the words that follow belong to a flag."""
    available = next((i for i, word in enumerate(rest) if _is_flag(word)), len(rest))
    flag = flags.get(names[0]) if len(names) == 1 else None
    if flag is None:
        no_value = names in (("help",), ("version",))
        return 0 if no_value else min(available, 1) if names == ("config",) else available
    if flag.takes_many:
        return available
    if flag.is_switch and available and rest[0].lower() not in TRUE_WORDS + FALSE_WORDS:
        return 0
    return min(available, 1)


def _is_flag(word: str) -> bool:
    """Whether a word is a flag and not a value: numbers, texts with blanks and `-` are values."""
    if not word.startswith("-") or word == "-" or NUMBER.fullmatch(word):
        return False
    return " " not in word.partition("=")[0]
