"""A text that every machine has: the source code of Python's standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from llm.config.errors import UserError
from llm.data.sources.documents import Skipped, TextChunk

NAME = "builtin:python"

# Names of folders.
_LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
}


@dataclass(frozen=True)
class PythonLibrarySource:
    """A `TextSource` over files of the standard library, each of which is one document.

    Attributes:
        root: the folder of the standard library.
        names: paths of the files below `root`, with `/` as separator, sorted.
    """

    root: Path
    names: tuple[str, ...]

    def __call__(self, skipped: Skipped) -> Iterator[TextChunk]:
        """Yield the text of each file, unchanged except that a byte order mark is dropped."""
        for name in self.names:
            try:
                text = (self.root / name).read_bytes().decode().removeprefix("\ufeff")
            except UnicodeDecodeError:
                skipped["file not UTF-8"] += 1
                continue
            except OSError:
                skipped["file cannot be read"] += 1
                continue
            if text:
                yield TextChunk(text, ends=True)
            else:
                skipped["empty file"] += 1

    @property
    def identity(self) -> list[list[str | int]]:
        """Name, size and time of the last change of each file: different when a file has changed."""
        identities: list[list[str | int]] = []
        for name in self.names:
            status = (self.root / name).stat()
            identities.append([name, status.st_size, status.st_mtime_ns])
        return identities


def open_python_library(percentage: float) -> tuple[PythonLibrarySource, PythonLibrarySource | None]:
    """Open the standard library without its tests, split by a hash of the files' names.

    With the hash a file stays in its split when a version of Python adds or removes other files.

    Args:
        percentage: percentage of the files to hold out for validation; 0 for none.

    Returns:
        The files for training, and the files for validation (None with percentage 0).

    Raises:
        UserError: this Python has no source code of its library, or no file is left for training.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(_source_names(root))
    if len(names) < 2:
        raise UserError(f"{NAME}: no Python source in {root}; name another text with --train_file")
    if percentage == 0:
        return PythonLibrarySource(root, tuple(names)), None
    lowest = min(names, key=_unit_hash)
    held_out = {name for name in names if _unit_hash(name) < percentage / 100} | {lowest}
    train = tuple(name for name in names if name not in held_out)
    if not train:
        raise UserError("--validation_split_percentage leaves no file for training; lower it")
    return PythonLibrarySource(root, train), PythonLibrarySource(root, tuple(sorted(held_out)))


def _source_names(root: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in names:
            if name.endswith(".py"):
                yield Path(parent, name).relative_to(root).as_posix()


def _unit_hash(name: str) -> float:
    """Hash a name to a number in [0, 1)."""
    digest = blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
