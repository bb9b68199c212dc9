"""A polite stop: the first signal, or the deadline, asks; a second signal ends the process at once."""

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

# One request often comes twice: a scheduler signals every process of a job, and torchrun, which is one of
# them, passes the signal on to the others.
_ECHO_SECONDS = 2.0
_LOOK_SECONDS = 0.5
_LAST_WORDS_SECONDS = 2.0
_END = 0  # no signal has that number


class StopRequest:
    """Whether this process was asked to stop, and why.

    Attributes:
        reason: the signal's name, max_time or walltime; None until then.
        deadline: when the run must stop without a signal.
    """

    def __init__(self, deadline: Deadline | None = None) -> None:
        self.reason: str | None = None
        self.deadline = deadline or Deadline()
        self.interrupts = False

    def __call__(self) -> bool:
        """True once a signal has come or the deadline has passed."""
        if self.reason is None:
            self.reason = self.deadline.reason()
        return self.reason is not None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """While the block runs, a stop is raised wherever the main thread is, instead of waiting to be asked for.

        For long work of which nothing is kept, or that keeps what it has by itself, and in which no other rank
        is spoken to. In a thread other than the main one a stop is seen before the block only.

        Raises:
            Stopped: the stop.
        """
        self.interrupts = True
        try:
            if self():
                raise Stopped(self.reason)
            yield
        finally:
            self.interrupts = False

    def interrupting(self, work: Callable[[], T]) -> Callable[[], T]:
        """The work as it is done `interruptible`."""

        def interrupted() -> T:
            with self.interruptible():
                return work()

        return interrupted

    def note(self, number: int, _: FrameType | None = None) -> None:
        """A signal, in the main thread."""
        self.reason = self.reason or signal.Signals(number).name
        if self.interrupts:
            # Once: the blocks that are left now have something to tidy up.
            self.interrupts = False
            raise Stopped(self.reason)


@contextmanager
def catch_stop_signals(
    deadline: Deadline | None = None, last_words: Callable[[str, int], None] | None = None
) -> Iterator[StopRequest]:
    """Catches SIGTERM, SIGINT and SIGUSR1 while the block runs; outside the main thread only the deadline counts.

    A second signal ends the process, with 128 + its number, also where the main thread hangs in a collective
    or in a library; not sooner than two seconds after the first, which until then is taken for the same
    request.

    Args:
        deadline: when the run must stop without a signal.
        last_words: called with the reason and the exit code before a second signal ends the process, which waits
            for it for two seconds at most.
    """
    request = StopRequest(deadline)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, request.note) for number in SIGNALS}
    # Python runs a handler when the main thread is back from whatever it is in; the number of the signal is in
    # the pipe at once.
    other = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _wakeups.append(writer)
    thread = threading.Thread(target=_Ears(request, reader, last_words).listen, name="signals", daemon=True)
    thread.start()
    try:
        yield request
    finally:
        _wakeups.remove(writer)
        signal.set_wakeup_fd(other)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writer, bytes([_END]))
        thread.join()
        os.close(writer)
        os.close(reader)


class _Ears:
    """The thread that counts signals, and sees the deadline where the main thread does not look."""

    def __init__(self, request: StopRequest, reader: int, last_words: Callable[[str, int], None] | None = None) -> None:
        self._request, self._reader, self._last_words = request, reader, last_words
        self._first: float | None = None
        self._nudges = 0
        self._is_said = False

    def listen(self) -> None:
        """Returns when the pipe says so."""
        while True:
            if select.select([self._reader], [], [], _LOOK_SECONDS)[0]:
                numbers = os.read(self._reader, 512)
                if _END in numbers:
                    return
                for number in numbers:
                    if number in SIGNALS:  # SIGCHLD and others come here too
                        self._hear(number)
            if self._request():
                self._say()
                if self._request.interrupts and self._first is None:
                    self._nudges += 1
                    # Any signal of ours makes the main thread look; this one is not counted.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _hear(self, number: int) -> None:
        if number == signal.SIGUSR1 and self._nudges:
            self._nudges -= 1
            return
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._request.reason = self._request.reason or signal.Signals(number).name
        elif now - self._first >= _ECHO_SECONDS:
            # Nothing is said through logging: the main thread may hang with its lock in its hands.
            reason, code = f"a second signal ({signal.Signals(number).name}): ended at once", 128 + number
            os.write(2, f"{reason}\n".encode())
            if self._last_words is not None:
                # In a thread: the disk may be what the run hangs in.
                said = threading.Thread(target=self._last_words, args=(reason, code), daemon=True)
                said.start()
                said.join(_LAST_WORDS_SECONDS)
            os._exit(code)

    def _say(self) -> None:
        if not self._is_said:
            self._is_said = True
            line = f"{self._request.reason}: the run saves and stops; a second signal ends it at once"
            # A console that takes no more lines must not make this thread deaf.
            threading.Thread(target=log.info, args=(line,), name="say", daemon=True).start()


# Ends of pipes that signals are written to now.
_wakeups: list[int] = []


def _forget_in_child() -> None:
    """A forked process (that reads blocks ahead) must not write its own signals into its parent's pipe."""
    if _wakeups:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)
