"""A lock file that names its holder, so that two runs never write into one folder."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from llm.config.errors import UserError

_HEARTBEAT_SECONDS = 10.0
_STALE_SECONDS = 60.0

# Locks of this very process; another one that has its number (in another container) is not it.
_held: set[Path] = set()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file while the block runs, and touches it every ten seconds.

    A lock is taken over when its process is gone from this host, or when nobody touched it for a minute:
    its holder was killed, perhaps on another host, where it cannot be asked.

    Raises:
        UserError: another run holds it.
    """
    path = path.resolve()
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex})
    while not _taken(path, content):
        _clear_if_stale(path)
    _held.add(path)
    ended = Event()
    Thread(target=_touch, args=(path, ended), name="lock", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        _held.discard(path)
        path.unlink(missing_ok=True)


def _taken(path: Path, content: str) -> bool:
    """Whether the lock is ours now."""
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    own.write_text(content)
    try:
        # A link appears whole or not at all: nobody ever reads a lock that does not name its holder yet.
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without links: the name still appears once only.
        try:
            with open(path, "x") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        own.unlink(missing_ok=True)
    return True


def _touch(path: Path, ended: Event) -> None:
    while not ended.wait(_HEARTBEAT_SECONDS):
        try:
            os.utime(path)
        except OSError:
            return


def _clear_if_stale(path: Path) -> None:
    """Removes a lock that nobody holds any more.

    Raises:
        UserError: somebody does.
    """
    try:
        content, age = path.read_text(), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return
    holder = _holder(content)
    if holder is not None and age < _STALE_SECONDS and _may_live(path, *holder):
        host, pid = holder
        raise UserError(
            f"{path.parent} is used by another run (process {pid} on {host}): wait for it (a minute, if it was "
            f"killed on another host), choose another --output_dir, or remove {path}"
        )
    # Moved away before it is judged again: another starter may have put its own in place since we read it.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if aside.read_text() != content and not path.exists():
        os.rename(aside, path)
        return
    aside.unlink()


def _holder(content: str) -> tuple[str, int] | None:
    """Host and process of a lock; None when it is none of ours."""
    try:
        holder = json.loads(content)
        return str(holder["host"]), int(holder["pid"])
    except (ValueError, KeyError, TypeError):
        return None


def _may_live(path: Path, host: str, pid: int) -> bool:
    if host != socket.gethostname():
        return True
    if pid == os.getpid():
        return path in _held
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
