"""Which files hold the text: names, globs and folders, checked before anything is read."""

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

# Files of a Hub dataset folder that hold no text of the dataset.
_CARDS = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json"}

# A path names a split by one of these words, without a letter directly before or after it.
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
    """A file and how to read it.

    Attributes:
        path: where the file is.
        kind: one of `DOCUMENT_KINDS` and `ROW_KINDS`.
        compression: one of `COMPRESSIONS`; None for none.
        num_bytes: size of the file as it is on the disk.
        modified_ns: time of the last change, in nanoseconds since the epoch.
    """

    path: Path
    kind: str
    compression: str | None
    num_bytes: int
    modified_ns: int

    @property
    def identity(self) -> list[str | int]:
        """Path, size and time of the last change: different when the file has changed."""
        return [str(self.path.absolute()), self.num_bytes, self.modified_ns]


def resolve_files(patterns: Sequence[str], flag: str) -> tuple[TextFile, ...]:
    """Return the files that names and globs match, each once; the matches of a glob are sorted by name.

    Args:
        patterns: names and globs (`**` crosses folders).
        flag: the option that holds the patterns, for messages.

    Raises:
        UserError: a file is missing, a folder, empty or of an unknown kind, or a glob matches no file.
    """
    files: dict[Path, TextFile] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if has_magic(expanded) and not os.path.lexists(expanded):
            matches = _without_empty([_text_file(path, flag) for path in _glob(expanded, flag)], expanded)
        else:
            matches = [_require_not_empty(_text_file(Path(expanded), flag))]
        for file in matches:
            files.setdefault(file.path, file)
    return tuple(files.values())


def resolve_paths(patterns: Sequence[str], flag: str) -> list[Path]:
    """Return the paths that names and globs match, each once; the matches of a glob are sorted by name.

    The content of the files is not checked.

    Args:
        patterns: names and globs (`**` crosses folders).
        flag: the option that holds the patterns, for messages.

    Raises:
        UserError: a file is missing, or a glob matches no file.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if has_magic(expanded) and not os.path.lexists(expanded):
            paths |= dict.fromkeys(_glob(expanded, flag))
        elif Path(expanded).is_file():
            paths[Path(expanded)] = None
        else:
            raise UserError(f"{flag} {pattern}: no such file; {_nearest_name(Path(expanded))}")
    return list(paths)


def resolve_folder(name: str, flag: str) -> Path:
    """Return the folder that an option names.

    Raises:
        UserError: the folder does not exist, or is a file.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{flag} {name}: is a file; name the folder that holds it, or give it as --train_file")
    raise UserError(f"{flag} {name}: no such folder; {_nearest_name(folder)}")


def _glob(pattern: str, flag: str) -> list[Path]:
    paths = [Path(name) for name in sorted(glob(pattern, recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        parent = Path(pattern).parent
        if has_magic(str(parent)):
            raise UserError(f"{flag} {pattern}: no file matches")
        raise UserError(f"{flag} {pattern}: no file matches; {_nearest_name(Path(pattern))}")
    return paths


def file_kind(path: Path) -> tuple[str, str | None] | None:
    """Return the kind and the compression that a file's name ends in, or None for an unknown kind."""
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
        raise UserError(f"{flag} {path}: no such file; {_nearest_name(path)}") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror}); check its permissions") from None
    if kind is None:
        raise UserError(f"{flag} {path}: unknown kind of file; known endings are {KNOWN_ENDINGS}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag} {path}: cannot be read (no permission); check its mode and owner")
    return TextFile(path, kind[0], kind[1], status.st_size, status.st_mtime_ns)


def _nearest_name(path: Path) -> str:
    """Describe the existing name that is nearest to a missing path, which corrects most typing mistakes."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir())
    except OSError:
        return f"folder {parent} cannot be listed"
    matches = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if matches:
        return f"the nearest name in {parent} is {matches[0]}"
    return f"nothing in {parent} has a similar name; check the path"


def _require_not_empty(file: TextFile) -> TextFile:
    if file.num_bytes == 0:
        raise UserError(f"{file.path}: is empty; name a file that holds text")
    return file


def _without_empty(files: list[TextFile], origin: str) -> list[TextFile]:
    """Drop the empty files of a glob or folder, with a warning that names it."""
    not_empty = [file for file in files if file.num_bytes > 0]
    if not not_empty:
        raise UserError(f"{origin}: all {len(files)} files are empty; name files that hold text")
    if len(not_empty) < len(files):
        log.warning("%s: left out %d empty files", origin, len(files) - len(not_empty))
    return not_empty


def find_split_files(folder: Path) -> dict[str, tuple[TextFile, ...]]:
    """Return the text files below a folder by split (`train`, `validation`), sorted by name.

    A file belongs to the split that its path below the folder names. Files of a test split are not used. If no file
    names `train`, the files that name no split are the training text. Hidden files are left out, as are the card and
    the descriptions of a Hub dataset if there are other files.

    Raises:
        UserError: the folder holds no text for training, or a file cannot be read.
    """
    candidates = list(_visible_files(folder))
    texts = [path for path in candidates if path.parent != folder or path.name not in _CARDS] or candidates
    paths: dict[str, list[Path]] = {"train": [], "validation": [], "test": [], "": []}
    for path in texts:
        paths[split_in_path(path.relative_to(folder))].append(path)
    without_split = paths.pop("")
    num_left_out = len(candidates) - len(texts) + len(paths.pop("test"))
    if paths["train"]:
        num_left_out += len(without_split)
    else:
        paths["train"] = without_split
    if not paths["train"]:
        raise UserError(
            f"--dataset_name {folder}: the folder holds no training text; known endings are {KNOWN_ENDINGS}"
        )
    log.info(
        "%s: %d files for training, %d for validation, %d left out (test, dataset card)",
        folder,
        len(paths["train"]),
        len(paths["validation"]),
        num_left_out,
    )
    splits = {}
    for split, names in paths.items():
        files = [_text_file(path, "--dataset_name") for path in names]
        splits[split] = tuple(_without_empty(files, str(folder)) if files else [])
    return splits


def _visible_files(folder: Path) -> Iterable[Path]:
    """Yield the files of known kinds below a folder, sorted, without hidden files and folders."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and file_kind(Path(name)) is not None:
                yield Path(parent, name)


def split_in_path(path: Path) -> str:
    """Return the split that a path names, or '' for none; a folder's name counts before the file's."""
    for name in path.parts:
        for split, pattern in _SPLIT_PATTERNS.items():
            if pattern.search(name):
                return split
    return ""
