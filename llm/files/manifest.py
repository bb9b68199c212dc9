"""`manifest.json`: the size and hash of every file of a folder, written last."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

NAME = "manifest.json"
_CHUNK_BYTES = 1 << 20


def write_manifest(folder: Path) -> None:
    """Writes `manifest.json` over all files that are below `folder` now."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "blake2b": hash_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NAME
    }
    (folder / NAME).write_text(json.dumps({"version": 1, "files": files}, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest, in a few words; None when every byte is right."""
    try:
        files = json.loads((folder / NAME).read_text())["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if hash_of(path) != expected["blake2b"]:
                return f"{name} has other content than when it was written"
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} cannot be read ({error})"
    return None


def hash_of(path: Path) -> str:
    """The BLAKE2b hash (16 bytes, as hexadecimal digits) of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
