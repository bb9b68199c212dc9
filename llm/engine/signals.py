"""A polite stop: the first signal asks, the second one ends the process at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __call__(self) -> bool:
        """True once a signal has come."""
        return self.reason is not None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Catches SIGTERM, SIGINT and SIGUSR1 while the block runs; works in the main thread only.

    The first signal is noted. The handlers that stood before are then put back, so that a second signal
    does what it always did: it ends the process.
    """
    request = StopRequest()
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.reason = signal.Signals(number).name
        restore()

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
