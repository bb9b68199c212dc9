"""A process that works for this one, and the pipe between the two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from weakref import WeakSet

# It does not import the program that started it, as `multiprocessing` would: that may be a notebook, or a
# script that trains when it is imported.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from llm.system.subprocesses import run; run({end})"

# They may reach all processes of a terminal or a job; what they mean is the starter's to say.
_NOT_FOR_IT = (signal.SIGINT, signal.SIGUSR1)

# Ends of pipes that are open here.
_ends: WeakSet[Connection] = WeakSet()


class Process:
    """Another process, which calls `work(pipe, *arguments)` and ends.

    It imports what the work needs and nothing else, and is no part of this one's group. When this process ends,
    however it does, the pipe closes: that is the sign for the work to end, too.

    Attributes:
        pipe: this end; the other one is the first argument of the work.
    """

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        """Starts it.

        Args:
            work: a function that can be imported by its name.
            arguments: anything that can be pickled.

        Raises:
            OSError: no process can be started.
        """
        if not sys.executable:
            raise OSError("this interpreter does not know its own program")
        errand = ForkingPickler.dumps((work, arguments))
        self.pipe, end = Pipe()
        path = [os.fspath(place) or os.getcwd() for place in sys.path]
        # Held back from the very beginning: it inherits that.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_IT)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format(path=path, end=end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[end.fileno()],
                start_new_session=True,
            )
        except OSError:
            self.pipe.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            end.close()
        _ends.add(self.pipe)
        with suppress(OSError):  # it was killed already, as its exit code says
            self.pipe.send_bytes(errand)

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended, minus a signal's number where one did; None while it lives."""
        return self._process.poll()

    def close_pipe(self) -> None:
        """Closes the pipe, so that it ends by itself."""
        self.pipe.close()

    def terminate(self) -> None:
        """Sends it SIGTERM."""
        self._process.terminate()

    def wait(self, seconds: float) -> int:
        """Its exit code, once it has ended; it is killed where that takes longer."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def run(end: int) -> None:
    """What the other process does.

    Args:
        end: the file number of its end of the pipe.
    """
    pipe = Connection(end)
    _ends.add(pipe)
    try:
        # Read before anything is imported: the starter waits until all of it is in the pipe.
        errand = pipe.recv_bytes()
    except (EOFError, OSError):
        return
    work, arguments = ForkingPickler.loads(errand)
    work(pipe, *arguments)


def _close_in_child() -> None:
    """A forked process (that reads blocks ahead) must not keep a pipe open when its parent has ended."""
    for pipe in list(_ends):
        pipe.close()


os.register_at_fork(after_in_child=_close_in_child)
