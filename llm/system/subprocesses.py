"""A subprocess that calls one function, connected to this process by a pipe."""

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

# Unlike `multiprocessing`, the subprocess does not import the main program: that may be a notebook, or a script that
# trains when it is imported.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from {module} import run; run({end})"

# Signals that may reach every process of a terminal or a job. This process decides what they mean for the subprocess.
_BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGUSR1)

# Open ends of pipes in this process.
_ends: WeakSet[Connection] = WeakSet()


class Process:
    """A subprocess that calls `work(pipe, *arguments)` and exits.

    The subprocess imports only what the work needs, and has a session of its own. When this process ends, for whatever
    reason, the pipe closes; the work must then end, too.

    Attributes:
        pipe: this process's end of the pipe; the work receives the other end as its first argument.
    """

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        """Start the subprocess.

        Args:
            work: a function that can be imported by its name.
            arguments: picklable values.

        Raises:
            OSError: the subprocess cannot be started.
        """
        if not sys.executable:
            raise OSError("this interpreter does not know its own program")
        task = ForkingPickler.dumps((work, arguments))
        self.pipe, end = Pipe()
        path = [os.fspath(entry) or os.getcwd() for entry in sys.path]
        program = _PROGRAM.format(path=path, module=__name__, end=end.fileno())
        # The subprocess inherits the blocked signals, so that they are blocked from its first instruction on.
        previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[end.fileno()],
                start_new_session=True,
            )
        except OSError:
            self.pipe.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
            end.close()
        _ends.add(self.pipe)
        with suppress(OSError):  # the subprocess was killed already; its exit code will tell
            self.pipe.send_bytes(task)

    @property
    def pid(self) -> int:
        """Process number of the subprocess."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code of the subprocess, or minus the number of the signal that ended it; None while it runs."""
        return self._process.poll()

    def close_pipe(self) -> None:
        """Close the pipe, which asks the subprocess to end."""
        self.pipe.close()

    def terminate(self) -> None:
        """Send SIGTERM to the subprocess."""
        self._process.terminate()

    def wait(self, seconds: float) -> int:
        """Wait until the subprocess has ended and return its exit code; kill it if it takes longer than `seconds`."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def run(end: int) -> None:
    """Receive the work and its arguments over the pipe and call it; the main function of the subprocess.

    Args:
        end: file descriptor of the subprocess's end of the pipe.
    """
    pipe = Connection(end)
    _ends.add(pipe)
    try:
        # Read the task before anything is imported: the parent blocks until the whole task is in the pipe.
        task = pipe.recv_bytes()
    except (EOFError, OSError):
        return
    work, arguments = ForkingPickler.loads(task)
    work(pipe, *arguments)


def _close_ends_in_child() -> None:
    """Close the pipes in a forked process (a DataLoader worker), which would keep them open after its parent's end."""
    for pipe in list(_ends):
        pipe.close()


os.register_at_fork(after_in_child=_close_ends_in_child)
