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
_POLL_SECONDS = 1.0


class LockLostError(UserError):
    """This process no longer holds the lock, so that it must not write in the locked folder."""


class Lock:
    """A lock file that this process has taken; another run takes it over if this process is suspended for a minute."""

    def __init__(self, path: Path, content: str) -> None:
        self._path = path
        self._content = content
        self._loss: str | None = None

    @property
    def is_lost(self) -> bool:
        """Whether this process already knows that it lost the lock; reads no file."""
        return self._loss is not None

    def is_held(self) -> bool:
        """Read the lock file and return whether this process still holds it; log a loss once."""
        return self._read_own(touch=False)

    def check(self) -> None:
        """Read the lock file.

        Raises:
            LockLostError: this process no longer holds the lock.
        """
        if not self.is_held():
            raise LockLostError(self._loss)

    def touch(self) -> bool:
        """Update the file's time, which shows that the holder is alive, and return whether the lock is still held."""
        return self._read_own(touch=True)

    def release(self) -> None:
        """Remove the lock file if this process still holds it."""
        if self.is_held():
            self._path.unlink(missing_ok=True)

    def _read_own(self, *, touch: bool) -> bool:
        if self.is_lost:
            return False
        try:
            # Touch the file that was read, even if another file takes its name in between.
            with open(self._path) as file:
                is_held = file.read() == self._content
                if is_held and touch:
                    os.utime(file.fileno())
        except (FileNotFoundError, PermissionError):  # PermissionError: a lock file of another user
            is_held = False
        except OSError:
            return True  # a disk that does not respond is no sign of another run
        if not is_held:
            self._report_loss()
        return is_held

    def _report_loss(self) -> None:
        try:
            lock_file = _read(self._path)
        except OSError as error:
            cause = f"can no longer be read ({error.strerror})"
        else:
            cause = "was removed" if lock_file is None else f"is held by another run now ({lock_file.holder})"
        self._loss = (
            f"the lock {self._path} {cause}: this run was suspended for a minute or more, or a user removed the file;"
            " this run must not write there any more; start it again when the other run has ended"
        )
        log.error("%s", self._loss)


# Locks of this process. A process in another container may have the same number; its locks are not listed here.
_held: dict[Path, Lock] = {}


@contextmanager
def locked(path: Path, *, job: str | None = None, wait_for_stale: bool = False) -> Iterator[Lock]:
    """Hold the lock file while the block runs, and touch it every ten seconds.

    If the block fails and the lock was lost, the loss is raised, since it is the cause of the failure.

    An existing lock is taken over in three cases: its process has ended on this host; it belongs to the same job on
    another host (a job runs once at a time); or it was not touched for a minute, so that its holder must have been
    killed, perhaps on another host, where the process cannot be checked.

    Args:
        path: path of the lock file.
        job: the scheduler's job that this process belongs to.
        wait_for_stale: whether to wait, up to that minute, for a lock of another host that is no longer touched.

    Raises:
        UserError: another run holds the lock.
        LockLostError: another run took the lock while the block ran.
    """
    path = path.resolve()
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": job, "id": uuid.uuid4().hex})
    touched: float | None = None
    while not _try_to_take(path, content):
        lock_file = _read(path)
        if lock_file is None:
            continue
        if lock_file.is_stale(job):
            _remove(path, lock_file.content)
        elif wait_for_stale and not lock_file.is_on_this_host and touched in (None, lock_file.touched):
            if touched is None:
                touched = lock_file.touched
                log.info("waiting for the lock of %s, last touched %.0f s ago", lock_file.holder, lock_file.age_seconds)
            time.sleep(_POLL_SECONDS)
        else:
            raise UserError(
                f"{path.parent} is used by another run ({lock_file.holder}): wait until it has ended (a minute, if it "
                f"was killed on another host), choose another --output_dir, or remove {path}"
            )
    lock = Lock(path, content)
    _held[path] = lock
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
    """Remove the locks that this process holds; for a process that ends without leaving its `locked` blocks."""
    for lock in list(_held.values()):
        lock.release()


def _try_to_take(path: Path, content: str) -> bool:
    """Create the lock file if there is none, and return whether this process has created it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(content)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    try:
        # A hard link appears with its whole content: no process ever reads a lock that does not name its holder yet.
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # The file system has no hard links. Exclusive creation still succeeds in one process only.
        try:
            with open(path, "x") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _keep_touching(lock: Lock, ended: Event) -> None:
    while not ended.wait(_HEARTBEAT_SECONDS):
        if not lock.touch():
            return


@dataclass(frozen=True)
class _LockFile:
    """A lock file as it was read, of any process.

    Attributes:
        path: path of the file.
        content: text of the file.
        touched: modification time, by the clock of the file system.
        age_seconds: seconds since `touched`, by the same clock.
        host: the holder's host; None if the file is not a valid lock.
        pid: the holder's process number.
        job: the holder's job.
    """

    path: Path
    content: str
    touched: float
    age_seconds: float
    host: str | None
    pid: int
    job: str | None

    @property
    def holder(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", job {self.job}" if self.job else "")

    @property
    def is_on_this_host(self) -> bool:
        return self.host == socket.gethostname()

    def is_stale(self, job: str | None) -> bool:
        """Whether no process holds the lock any more, as far as a process of this job can determine."""
        if self.host is None or self.age_seconds >= _STALE_SECONDS:
            return True
        if not self.is_on_this_host:
            return job is not None and self.job == job
        if self.pid == os.getpid():
            return self.path not in _held
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # the process exists and belongs to another user
            pass
        return False


def _read(path: Path) -> _LockFile | None:
    """Read a lock file; return None if there is none (any more)."""
    try:
        content = path.read_text()
        touched = path.stat().st_mtime
    except FileNotFoundError:
        return None
    host: str | None = None
    pid = 0
    job = None
    try:
        holder = json.loads(content)
        pid = int(holder["pid"])
        job = holder.get("job")
        host = str(holder["host"])
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return _LockFile(path, content, touched, _now(path) - touched, host, pid, job)


def _now(path: Path) -> float:
    """Return the time of the file system of `path`, which may be another machine's clock."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _remove(path: Path, content: str) -> None:
    """Remove a lock file if it still has the content that was read."""
    # Rename the file before its content is compared again: another process may have created its own lock since.
    renamed = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        os.rename(path, renamed)
    except FileNotFoundError:
        return
    if renamed.read_text() != content and not path.exists():
        os.rename(renamed, path)
        return
    renamed.unlink()


def lock_holder(path: Path) -> tuple[str, int] | None:
    """Return the host and the process number of the lock's holder; None if the lock is free or stale."""
    try:
        lock_file = _read(path.resolve())
    except OSError:
        return None
    if lock_file is None or lock_file.host is None or lock_file.is_stale(None):
        return None
    return lock_file.host, lock_file.pid
