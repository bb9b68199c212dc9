"""Folders with weights, as `--train_dir A=0.7 B=0.3` names them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,2})?", re.IGNORECASE)


@dataclass(frozen=True)
class WeightedDir:
    """A folder and its share of what is read.

    Attributes:
        name: as it was given, without the weight.
        weight: the exact number; all weights add up to 1. None where no folder has one.
    """

    name: str
    weight: Fraction | None


def parse_weighted_dirs(words: Sequence[str]) -> list[WeightedDir]:
    """The folders that the words name.

    What follows the last `=` is a weight if it is a number, unless there is a folder of the whole name.

    Raises:
        ValueError: weights that are not above 0, or not of all folders; a folder named twice.
    """
    found = [_read(word) for word in words]
    names = [folder.name for folder in found]
    weights = [folder.weight for folder in found if folder.weight is not None]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--train_dir {name}: is named twice; name it once, with the sum of the weights")
    if not weights:
        return found
    for word, folder in zip(words, found, strict=True):
        if folder.weight is None:
            raise ValueError(f"--train_dir {word}: has no weight, but others have; write {word}=0.5, or give none one")
        if folder.weight <= 0:
            raise ValueError(f"--train_dir {word}: a weight must be above 0; leave the folder out")
    total = sum(weights)
    return [WeightedDir(name, weight / total) for name, weight in zip(names, weights, strict=True)]


def _read(word: str) -> WeightedDir:
    name, equals, number = word.rpartition("=")
    if name and equals and _NUMBER.fullmatch(number) and not Path(word).expanduser().is_dir():
        return WeightedDir(name, Fraction(number))
    return WeightedDir(word, None)
