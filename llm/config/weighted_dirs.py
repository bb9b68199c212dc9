"""Folders with weights, as in `--train_dir A=0.7 B=0.3`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,2})?", re.IGNORECASE)


@dataclass(frozen=True)
class WeightedDir:
    """A folder and its share of the blocks that are read.

    Attributes:
        name: the folder as it was given, without its weight.
        weight: the exact share, where the weights of all folders add up to 1; None where no folder has a weight.
    """

    name: str
    weight: Fraction | None


def parse_weighted_dirs(words: Sequence[str]) -> list[WeightedDir]:
    """Return the folders that the words name, with their weights scaled to a sum of 1.

    The part after the last `=` of a word is a weight if it is a number, unless a folder has the entire word as
    its name.

    Raises:
        ValueError: a weight is not above 0, only some folders have a weight, or a folder is named twice.
    """
    dirs = [_parse_word(word) for word in words]
    names = [entry.name for entry in dirs]
    weights = [entry.weight for entry in dirs if entry.weight is not None]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--train_dir {name}: is named twice; name it once, with the sum of the weights")
    if not weights:
        return dirs
    for word, entry in zip(words, dirs, strict=True):
        if entry.weight is None:
            raise ValueError(
                f"--train_dir {word}: has no weight, but others have one; write {word}=0.5, or give no weights"
            )
        if entry.weight <= 0:
            raise ValueError(f"--train_dir {word}: a weight must be above 0; leave the folder out")
    total = sum(weights)
    return [WeightedDir(name, weight / total) for name, weight in zip(names, weights, strict=True)]


def _parse_word(word: str) -> WeightedDir:
    name, equals, number = word.rpartition("=")
    if name and equals and _NUMBER.fullmatch(number) and not Path(word).expanduser().is_dir():
        return WeightedDir(name, Fraction(number))
    return WeightedDir(word, None)
