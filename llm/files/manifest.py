"""`manifest.json`: size and hash of every file in a folder, and a hash of the manifest itself; written last."""

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
    """Write `manifest.json` for all files that are below `folder` now."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, _HASH: hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_bytes(_serialised(files))


def find_damage(folder: Path, *, read_content: bool = True) -> str | None:
    """Compare a folder with its manifest; return the first difference in a few words, or None if there is none.

    Files that the manifest does not list are ignored: loaders read fixed names, and prefer safetensors to other
    formats. Users add notes, and network disks add `.nfs*` files.

    Args:
        folder: the folder that contains the manifest.
        read_content: whether to hash the content of every file; False compares the manifest's own hash, and the names
            and sizes of the files.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return _unreadable(MANIFEST, error)
    try:
        files = json.loads(content)["files"]
        # Compare the exact bytes: this finds every change of a name, a number, a hash or the text between them.
        if content != _serialised(files):
            return (
                f"{MANIFEST} has other content than when it was written (or another version of this program wrote it)"
            )
    except (ValueError, KeyError, TypeError, RecursionError):
        # The error's own text would not help the user, and may quote pages of the file.
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
    """Return the 128-bit XXH3 hash of a file's content, in hexadecimal digits.

    The hash detects accidental changes, not forgeries, at the speed of memory. Reading and hashing release the GIL.
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
    """Return the bytes of the manifest, which include a hash over the names, sizes and hashes of the files."""
    manifest_hash = xxhash.xxh3_128_hexdigest(json.dumps(files).encode())
    return (json.dumps({"version": _VERSION, "files": files, _HASH: manifest_hash}, indent=1) + "\n").encode()
