"""A lock file that names its holder, so that two runs never write into one folder."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from llm.config.errors import UserError

log = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 10.0
_STALE_SECONDS = 60.0
_LOOK_SECONDS = 1.0


class LockLostError(UserError):
    """The lock is not this process's any more, so that it must not write there."""


class Lock:
    """A lock file that this process took, and may lose: to another run, when it stood still and was taken for dead."""

    def __init__(self, path: Path, content: str) -> None:
        self._path, self._content = path, content
        self._loss: str | None = None

    @property
    def is_lost(self) -> bool:
        """Whether the loss is known; nothing is read."""
        return self._loss is not None

    def is_held(self) -> bool:
        """Looks at the file; a loss is logged once."""
        return self._look(touch=False)

    def check(self) -> None:
        """Looks at the file.

        Raises:
            LockLostError: it is not ours any more.
        """
        if not self.is_held():
            raise LockLostError(self._loss)

    def touch(self) -> bool:
        """Shows others that its holder lives, if it is ours, and whether it is."""
        return self._look(touch=True)

    def release(self) -> None:
        """Removes the file, if it is ours."""
        if self.is_held():
            self._path.unlink(missing_ok=True)

    def _look(self, *, touch: bool) -> bool:
        if self.is_lost:
            return False
        try:
            # What is touched is what was read, whatever takes its name meanwhile.
            with open(self._path) as file:
                is_ours = file.read() == self._content
                if is_ours and touch:
                    os.utime(file.fileno())
        except (FileNotFoundError, PermissionError):  # of another user
            is_ours = False
        except OSError:
            return True  # a disk that does not answer is no sign of another run
        if not is_ours:
            self._lose()
        return is_ours

    def _lose(self) -> None:
        try:
            found = _read(self._path)
        except OSError as error:
            whose = f"cannot be read any more ({error.strerror})"
        else:
            whose = "is gone" if found is None else f"is held by another run now ({found.holder})"
        self._loss = (
            f"the lock {self._path} {whose}: this run stood still for a minute or more, or somebody removed the file;"
            " it must not write there any more; start it again when the other one has ended"
        )
        log.error("%s", self._loss)


# Locks of this very process; another one that has its number (in another container) is not it.
_held: dict[Path, Lock] = {}


@contextmanager
def locked(path: Path, *, job: str | None = None, wait_for_stale: bool = False) -> Iterator[Lock]:
    """Holds the lock file while the block runs, and touches it every ten seconds.

    When the block fails and the lock was lost, the loss is raised: it is the cause.

    A lock is taken over when its process is gone from this host, when it is of this very job on another host
    (which runs once at a time), or when nobody touched it for a minute: its holder was killed, perhaps on
    another host, where it cannot be asked.

    Args:
        path: of the lock file.
        job: the scheduler's job that this process belongs to.
        wait_for_stale: whether to wait, up to that minute, for a lock of another host that nobody touches any more.

    Raises:
        UserError: another run holds it.
        LockLostError: another run took it while the block ran.
    """
    path = path.resolve()
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": job, "id": uuid.uuid4().hex})
    touched: float | None = None
    while not _taken(path, content):
        found = _read(path)
        if found is None:
            continue
        if found.is_stale(job):
            _remove(path, found.content)
        elif wait_for_stale and not found.is_here and touched in (None, found.touched):
            if touched is None:
                touched = found.touched
                log.info("waiting for the lock of %s, last touched %.0f s ago", found.holder, found.age)
            time.sleep(_LOOK_SECONDS)
        else:
            raise UserError(
                f"{path.parent} is used by another run ({found.holder}): wait for it (a minute, if it was killed on "
                f"another host), choose another --output_dir, or remove {path}"
            )
    _held[path] = lock = Lock(path, content)
    ended = Event()
    Thread(target=_keep_touching, args=(lock, ended), name="lock", daemon=True).start()
    try:
        yield lock
    except Exception as error:
        if not isinstance(error, LockLostError):
            lock.check()
        raise
    finally:
        ended.set()
        _held.pop(path, None)
        lock.release()


def release_all() -> None:
    """Removes the locks that this process holds, for one that ends without leaving its blocks."""
    for lock in list(_held.values()):
        lock.release()


def _taken(path: Path, content: str) -> bool:
    """Whether the lock is ours now."""
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        own.write_text(content)
    except OSError:
        own.unlink(missing_ok=True)
        raise
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


def _keep_touching(lock: Lock, ended: Event) -> None:
    while not ended.wait(_HEARTBEAT_SECONDS):
        if not lock.touch():
            return


@dataclass(frozen=True)
class _Found:
    """Somebody's lock file, as it was read.

    Attributes:
        touched: when, by the clock of the file system.
        age: seconds from there, by the same clock.
        host: of the holder; None in a file that is no lock of ours.
    """

    path: Path
    content: str
    touched: float
    age: float
    host: str | None
    pid: int
    job: str | None

    @property
    def holder(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", job {self.job}" if self.job else "")

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def is_stale(self, job: str | None) -> bool:
        """Whether nobody holds it any more, as seen from this job."""
        if self.host is None or self.age >= _STALE_SECONDS:
            return True
        if not self.is_here:
            return job is not None and self.job == job
        if self.pid == os.getpid():
            return self.path not in _held
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


def _read(path: Path) -> _Found | None:
    """The lock that is there; None when it is there no more."""
    try:
        content, touched = path.read_text(), path.stat().st_mtime
    except FileNotFoundError:
        return None
    host: str | None = None
    pid, job = 0, None
    try:
        facts = json.loads(content)
        pid, job, host = int(facts["pid"]), facts.get("job"), str(facts["host"])
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return _Found(path, content, touched, _now(path) - touched, host, pid, job)


def _now(path: Path) -> float:
    """The time by the clock that stamps the files there, which may be another machine's."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _remove(path: Path, content: str) -> None:
    """Removes a lock, if it is still the one that was read."""
    # Moved away before it is judged again: another starter may have put its own in place since.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if aside.read_text() != content and not path.exists():
        os.rename(aside, path)
        return
    aside.unlink()


def lock_holder(path: Path) -> tuple[str, int] | None:
    """Host and process that hold the lock; None when nobody does, or only somebody who was killed."""
    try:
        found = _read(path.resolve())
    except OSError:
        return None
    return None if found is None or found.host is None or found.is_stale(None) else (found.host, found.pid)
