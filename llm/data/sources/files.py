"""Which files hold the text: names, globs and folders, refused early when they cannot be right."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from llm.config.errors import UserError

log = logging.getLogger(__name__)

DOCUMENT_KINDS = ("txt", "md")
ROW_KINDS = ("csv", "tsv", "json", "jsonl", "parquet")
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
KNOWN_ENDINGS = (
    ", ".join(f".{kind}" for kind in DOCUMENT_KINDS + ROW_KINDS)
    + "; all but parquet also with "
    + ", ".join(f".{compression}" for compression in COMPRESSIONS)
)

# What a dataset folder of the Hub holds beside its text.
_CARDS = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json"}

# A path names a split by one of these words, set apart by anything but letters.
# Source: the same words as huggingface/datasets, data_files.py.
_SPLIT_WORDS = {
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
    "train": ("train", "training"),
}
_SPLIT_PATTERNS = {
    split: re.compile(rf"(?<![A-Za-z])({'|'.join(words)})(?![A-Za-z])", re.IGNORECASE)
    for split, words in _SPLIT_WORDS.items()
}


@dataclass(frozen=True)
class TextFile:
    """A file and how to read it: its kind (`txt`, `csv`, ...), its compression, size and age."""

    path: Path
    kind: str
    compression: str | None
    num_bytes: int
    modified_ns: int

    @property
    def identity(self) -> list[str | int]:
        """What changes when the file does: path, size and time of the last change."""
        return [str(self.path.absolute()), self.num_bytes, self.modified_ns]


def resolve_files(patterns: Sequence[str], flag: str) -> tuple[TextFile, ...]:
    """The files that names and globs mean, each once, a glob's in the order of their names.

    Args:
        patterns: names and globs (`**` crosses folders).
        flag: the option they come from, for messages.

    Raises:
        UserError: a file is missing, a folder, empty or of an unknown kind, or a glob matches none.
    """
    found: dict[Path, TextFile] = {}
    for pattern in patterns:
        plain = os.path.expanduser(pattern)
        if has_magic(plain) and not os.path.lexists(plain):
            files = _without_empty([_text_file(path, flag) for path in _glob(plain, flag)], plain)
        else:
            files = [_not_empty(_text_file(Path(plain), flag))]
        for file in files:
            found.setdefault(file.path, file)
    return tuple(found.values())


def resolve_paths(patterns: Sequence[str], flag: str) -> list[Path]:
    """The paths that names and globs mean, whatever is in them, a glob's in the order of their names.

    Raises:
        UserError: a file is missing, or a glob matches none.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        plain = os.path.expanduser(pattern)
        if has_magic(plain) and not os.path.lexists(plain):
            found |= dict.fromkeys(_glob(plain, flag))
        elif Path(plain).is_file():
            found[Path(plain)] = None
        else:
            raise UserError(f"{flag} {pattern}: no such file; {_neighbours(Path(plain))}")
    return list(found)


def resolve_folder(name: str, flag: str) -> Path:
    """The folder that an option names.

    Raises:
        UserError: there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{flag} {name}: is a file; name the folder that it lies in, or give it as --train_file")
    raise UserError(f"{flag} {name}: no such folder; {_neighbours(folder)}")


def _glob(pattern: str, flag: str) -> list[Path]:
    paths = [Path(name) for name in sorted(glob(pattern, recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        parent = Path(pattern).parent
        if has_magic(str(parent)):
            raise UserError(f"{flag} {pattern}: no file matches")
        raise UserError(f"{flag} {pattern}: no file matches; {_neighbours(Path(pattern))}")
    return paths


def file_kind(path: Path) -> tuple[str, str | None] | None:
    """The kind and the compression that a file's name says, or None if it says neither."""
    endings = path.name.lower().split(".")[1:]
    compression = endings.pop() if endings and endings[-1] in COMPRESSIONS else None
    if not endings or endings[-1] not in DOCUMENT_KINDS + ROW_KINDS:
        return None
    if endings[-1] == "parquet" and compression is not None:
        return None
    return endings[-1], compression


def _text_file(path: Path, flag: str) -> TextFile:
    if path.is_dir():
        raise UserError(
            f"{flag} {path}: is a folder; give its files, such as '{path}/*.txt', or the folder as --dataset_name"
        )
    kind = file_kind(path)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file; {_neighbours(path)}") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror}); check its permissions") from None
    if kind is None:
        raise UserError(f"{flag} {path}: unknown kind of file; known endings are {KNOWN_ENDINGS}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag} {path}: cannot be read (no permission); check its mode and owner")
    return TextFile(path, kind[0], kind[1], status.st_size, status.st_mtime_ns)


def _neighbours(path: Path) -> str:
    """What there is instead of a path that is missing: the mend of most typing mistakes."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir())
    except OSError:
        return f"folder {parent} cannot be listed"
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"the nearest name in {parent} is {near[0]}"
    return f"nothing in {parent} has a similar name; check the path"


def _not_empty(file: TextFile) -> TextFile:
    if file.num_bytes == 0:
        raise UserError(f"{file.path}: is empty; name a file that holds text")
    return file


def _without_empty(files: list[TextFile], place: str) -> list[TextFile]:
    """Leaves empty files out of a glob's or a folder's, and says so."""
    full = [file for file in files if file.num_bytes > 0]
    if not full:
        raise UserError(f"{place}: all {len(files)} files are empty; name files that hold text")
    if len(full) < len(files):
        log.warning("%s: left out %d empty files", place, len(files) - len(full))
    return full


def find_split_files(folder: Path) -> dict[str, tuple[TextFile, ...]]:
    """Every text file below a folder, by split (`train`, `validation`), ordered by name.

    Files whose path below the folder names a split belong to it, and those of a test split are not
    used. If none names `train`, those that name no split are the training text. Hidden files are
    left out, and so are the card and descriptions of a Hub dataset, if there is anything else.

    Raises:
        UserError: the folder holds no text for training, or a file cannot be read.
    """
    found = list(_visible(folder))
    text = [path for path in found if path.parent != folder or path.name not in _CARDS] or found
    paths: dict[str, list[Path]] = {"train": [], "validation": [], "test": [], "": []}
    for path in text:
        paths[split_in_path(path.relative_to(folder))].append(path)
    unnamed = paths.pop("")
    left_out = len(found) - len(text) + len(paths.pop("test"))
    if paths["train"]:
        left_out += len(unnamed)
    else:
        paths["train"] = unnamed
    if not paths["train"]:
        raise UserError(
            f"--dataset_name {folder}: the folder holds no training text; known endings are {KNOWN_ENDINGS}"
        )
    log.info(
        "%s: %d files for training, %d for validation, %d left out (test, dataset card)",
        *(folder, len(paths["train"]), len(paths["validation"]), left_out),
    )
    splits = {}
    for split, names in paths.items():
        files = [_text_file(path, "--dataset_name") for path in names]
        splits[split] = tuple(_without_empty(files, str(folder)) if files else [])
    return splits


def _visible(folder: Path) -> Iterable[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and file_kind(Path(name)) is not None:
                yield Path(parent, name)


def split_in_path(path: Path) -> str:
    """The split that a path names, its folders before its file name, or '' for none."""
    for name in path.parts:
        for split, pattern in _SPLIT_PATTERNS.items():
            if pattern.search(name):
                return split
    return ""
