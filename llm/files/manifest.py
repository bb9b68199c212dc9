"""`manifest.json`: the size and hash of every file of a folder, its own included, written last."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
_VERSION = 2
_HASH = "xxh3_128"


def write_manifest(folder: Path) -> None:
    """Writes `manifest.json` over all files that are below `folder` now."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, _HASH: hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_bytes(_serialised(files))


def find_damage(folder: Path, *, read_content: bool = True) -> str | None:
    """What is wrong with a folder that has a manifest, in a few words; None when every byte is right.

    A file that the manifest does not list is no damage: nobody reads it (all names are known, and weights
    in safetensors come before any others), and people put notes and network disks put `.nfs*` files there.

    Args:
        folder: the folder.
        read_content: False looks at the manifest, and at the names and sizes of the others only.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return _unreadable(MANIFEST, error)
    try:
        files = json.loads(content)["files"]
        # To the byte: whatever was changed, in a name, a number, a hash, or between them, is found here.
        if content != _serialised(files):
            return (
                f"{MANIFEST} has other content than when it was written (or another version of this program wrote it)"
            )
    except (ValueError, KeyError, TypeError, RecursionError):
        # The cause says nothing to a person, and may quote pages of it.
        return f"{MANIFEST} cannot be read (it is not what this program writes)"
    for name, expected in files.items():
        try:
            problem = _damage_of_file(folder / name, expected, read_content=read_content)
        except OSError as error:
            return _unreadable(name, error)
        if problem is not None:
            return f"{name} {problem}"
    return None


def hash_file(path: Path) -> str:
    """The XXH3 hash (128 bits, as hexadecimal digits) of a file's content.

    It finds accidents, not forgers, at the speed of memory; reading and hashing let go of the interpreter.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _damage_of_file(path: Path, expected: dict[str, Any], *, read_content: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    num_bytes = path.stat().st_size
    if num_bytes != expected["bytes"]:
        return f"has {num_bytes} bytes instead of {expected['bytes']}"
    if read_content and hash_file(path) != expected[_HASH]:
        return "has other content than when it was written"
    return None


def _unreadable(name: str, error: OSError) -> str:
    return f"{name} cannot be read ({error.strerror or type(error).__name__})"


def _serialised(files: dict[str, Any]) -> bytes:
    """The one text of a manifest, with a hash over its files' names, sizes and hashes."""
    own = xxhash.xxh3_128_hexdigest(json.dumps(files).encode())
    return (json.dumps({"version": _VERSION, "files": files, _HASH: own}, indent=1) + "\n").encode()
