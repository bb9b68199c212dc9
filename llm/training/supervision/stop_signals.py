"""Graceful stop: the first signal, or the deadline, requests a stop; a second signal ends the process at once."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from llm.config.errors import Stopped
from llm.training.supervision.deadline import Deadline

log = logging.getLogger(__name__)
T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# A single request often arrives twice: a scheduler signals every process of a job, and torchrun, which is one of these
# processes, forwards the signal to the others. Signals within this time after the first count as the same request.
_REPEAT_SECONDS = 2.0
_POLL_SECONDS = 0.5
# The longest wait for `on_forced_exit`.
_EXIT_GRACE_SECONDS = 2.0
# Byte in the wake-up pipe that ends the thread; no signal has this number.
_END = 0


class StopRequest:
    """Whether this process was asked to stop, and why.

    Attributes:
        reason: the signal's name, max_time or walltime; None before the request.
        deadline: when the run must stop without a signal.
        interrupts: whether a request raises `Stopped` in the main thread now.
    """

    def __init__(self, deadline: Deadline | None = None) -> None:
        self.reason: str | None = None
        self.deadline = deadline or Deadline()
        self.interrupts = False

    def __call__(self) -> bool:
        """Return True once a signal has arrived or the deadline has passed."""
        if self.reason is None:
            self.reason = self.deadline.reason()
        return self.reason is not None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Stopped` in the main thread as soon as a stop is requested while the block runs.

        Use it for long work whose results are not kept, or that saves its results itself, and that does not
        communicate with other ranks. In a thread other than the main thread, a stop is noticed only before the block.
        It is not re-entrant: the end of an inner block ends the effect of the outer one.

        Raises:
            Stopped: a stop was requested.
        """
        self.interrupts = True
        try:
            if self():
                raise Stopped(self.reason)
            yield
        finally:
            self.interrupts = False

    def interrupting(self, work: Callable[[], T]) -> Callable[[], T]:
        """Return a function that does the work inside `interruptible`."""

        def interrupted() -> T:
            with self.interruptible():
                return work()

        return interrupted

    def on_signal(self, number: int, _: FrameType | None = None) -> None:
        """Record a signal; Python calls this handler in the main thread.

        Raises:
            Stopped: inside `interruptible`.
        """
        self.reason = self.reason or signal.Signals(number).name
        if self.interrupts:
            # Raise once only, so that the clean-up of the blocks that are left is not interrupted.
            self.interrupts = False
            raise Stopped(self.reason)


@contextmanager
def catch_stop_signals(
    deadline: Deadline | None = None, on_forced_exit: Callable[[str, int], None] | None = None
) -> Iterator[StopRequest]:
    """Catch SIGTERM, SIGINT and SIGUSR1 while the block runs; outside the main thread only the deadline applies.

    A second signal ends the process with exit code 128 + its number, even if the main thread hangs in a collective
    or in a library. Signals in the first two seconds after the first one count as the same request.

    Args:
        deadline: when the run must stop without a signal.
        on_forced_exit: called with the reason and the exit code before a second signal ends the process, which waits
            at most two seconds for it.
    """
    request = StopRequest(deadline)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous_handlers = {number: signal.signal(number, request.on_signal) for number in SIGNALS}
    # Python runs a handler only when the main thread returns from C code; the number of the signal is in the pipe
    # immediately.
    previous_wakeup_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _wakeup_fds.append(writer)
    watcher = _SignalThread(request, reader, on_forced_exit)
    thread = threading.Thread(target=watcher.run, name="signals", daemon=True)
    thread.start()
    try:
        yield request
    finally:
        _wakeup_fds.remove(writer)
        signal.set_wakeup_fd(previous_wakeup_fd)
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        os.write(writer, bytes([_END]))
        thread.join()
        os.close(writer)
        os.close(reader)


class _SignalThread:
    """Counts signals, and checks the deadline while the main thread is busy, in a thread of its own.

    Args:
        request: records the first signal.
        reader: end of the wake-up pipe, one byte a signal.
        on_forced_exit: see `catch_stop_signals`.
    """

    def __init__(
        self, request: StopRequest, reader: int, on_forced_exit: Callable[[str, int], None] | None = None
    ) -> None:
        self._request = request
        self._reader = reader
        self._on_forced_exit = on_forced_exit
        self._first_signal_time: float | None = None
        self._num_own_signals = 0
        self._has_announced = False

    def run(self) -> None:
        """Read signals from the pipe until it contains `_END`."""
        while True:
            if select.select([self._reader], [], [], _POLL_SECONDS)[0]:
                numbers = os.read(self._reader, 512)
                if _END in numbers:
                    return
                for number in numbers:
                    if number in SIGNALS:  # the pipe receives SIGCHLD and others too
                        self._count(number)
            if self._request():
                self._announce()
                if self._request.interrupts and self._first_signal_time is None:
                    self._num_own_signals += 1
                    # The deadline has passed: any signal of SIGNALS makes the main thread raise. `_count` ignores it.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _count(self, number: int) -> None:
        """Record the first signal; end the process at the second."""
        if number == signal.SIGUSR1 and self._num_own_signals:
            self._num_own_signals -= 1
            return
        now = time.monotonic()
        if self._first_signal_time is None:
            self._first_signal_time = now
            self._request.reason = self._request.reason or signal.Signals(number).name
        elif now - self._first_signal_time >= _REPEAT_SECONDS:
            # Written past logging, because the main thread may hang while it holds the lock of logging.
            reason = f"a second signal ({signal.Signals(number).name}): ended at once"
            exit_code = 128 + number
            os.write(2, f"{reason}\n".encode())
            if self._on_forced_exit is not None:
                # In a thread, because the run may hang in the disk that this call writes to.
                writer = threading.Thread(target=self._on_forced_exit, args=(reason, exit_code), daemon=True)
                writer.start()
                writer.join(_EXIT_GRACE_SECONDS)
            os._exit(exit_code)

    def _announce(self) -> None:
        if not self._has_announced:
            self._has_announced = True
            line = f"{self._request.reason}: the run saves and stops; a second signal ends it at once"
            # In a thread, because a console that blocks must not keep this thread from counting signals.
            threading.Thread(target=log.info, args=(line,), name="announce-stop", daemon=True).start()


# Write ends of the pipes that receive signals now.
_wakeup_fds: list[int] = []


def _reset_wakeup_fd_in_child() -> None:
    """Keep a forked process (a data loader worker) from writing its own signals into the pipe of its parent."""
    if _wakeup_fds:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_reset_wakeup_fd_in_child)
