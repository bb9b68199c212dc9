"""A lock file that names its holder, so that two runs never write into one folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm.config.errors import UserError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file while the block runs.

    A lock whose process is gone from this host is taken over. One held on another host cannot be asked,
    so it is refused, and the message says which file to remove.

    Raises:
        UserError: another run holds it.
    """
    own = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    own.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    try:
        # A link appears whole or not at all: nobody ever reads a lock that does not name its holder yet.
        while not _linked(own, path):
            _refuse_a_live_holder(path)
            path.unlink(missing_ok=True)
    finally:
        own.unlink()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _linked(own: Path, path: Path) -> bool:
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    return True


def _refuse_a_live_holder(path: Path) -> None:
    try:
        holder = json.loads(path.read_text())
        host, pid = str(holder["host"]), int(holder["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # gone in the meantime, or no lock of ours
    if host == socket.gethostname() and not _is_alive(pid):
        return
    raise UserError(
        f"{path.parent} is used by another run (process {pid} on {host}): wait for it, choose another "
        f"--output_dir, or remove {path} if that run is gone"
    )


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
