"""Whether the run still moves: a hung update ends it, with the stacks of all threads; other waiting is named."""

from __future__ import annotations

import faulthandler
import logging
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llm.distributed.world import World
from llm.training.run_dir.folder import RunDirectory

log = logging.getLogger(__name__)

_LEAST_LIMIT_SECONDS = 300.0
# The first update compiles, and starts the device's libraries: nobody knows yet how long one takes.
_FIRST_LIMIT_SECONDS = 1800.0
_LIMIT_FACTOR = 20
_NUM_REMEMBERED = 101
_LINE_SECONDS = 60.0
_LOOK_SECONDS = 1.0
# A process that was suspended, or a machine that slept, is not hung: of a longer pause between two looks only
# this much counts.
_LONGEST_LOOK_SECONDS = 5.0
# Rank 0 ends the run, and the launcher then the other ranks: they get so long to show their stacks first.
_GRACE_SECONDS = 10.0
_LAST_WORDS_SECONDS = 20.0


class _Phase:
    """What goes on, and for how long it has."""

    def __init__(self, name: str, *, is_update: bool = False) -> None:
        self.name, self.is_update = name, is_update
        self.seconds = self.said = 0.0
        self.is_reported = False


class Watchdog:
    """Is told what goes on, and looks once a second.

    Args:
        report: called once with a line about an update that hangs.
        end: called after that, when the run is to end.
        grace_seconds: how long between the two.
        clock: seconds.
    """

    def __init__(
        self,
        report: Callable[[str], None],
        end: Callable[[str], None],
        *,
        grace_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report, self._end, self._grace_seconds, self._clock = report, end, grace_seconds, clock
        self._phase = _Phase("the start")
        self._looked = self.heard = clock()
        self._update_seconds: deque[float] = deque(maxlen=_NUM_REMEMBERED)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """While the block runs, that is what a line a minute says is waited for."""
        outer, self._phase = self._phase, _Phase(name)
        try:
            yield
        finally:
            self._phase = outer

    @contextmanager
    def update(self) -> Iterator[None]:
        """One update of the weights: the block that must not hang."""
        outer, self._phase = self._phase, _Phase("an update", is_update=True)
        started = self._clock()
        try:
            yield
            self._update_seconds.append(self._clock() - started)
        finally:
            self._phase = outer

    @property
    def limit_seconds(self) -> float:
        """How long an update may take."""
        if not self._update_seconds:
            return _FIRST_LIMIT_SECONDS
        return max(_LEAST_LIMIT_SECONDS, _LIMIT_FACTOR * statistics.median(list(self._update_seconds)))

    def look(self) -> None:
        """Says what is waited for, or ends what hangs."""
        now, phase = self._clock(), self._phase
        phase.seconds += min(now - self._looked, _LONGEST_LOOK_SECONDS)
        self._looked = now
        if phase.is_update:
            limit = self.limit_seconds
            line = f"no update finished for {phase.seconds:.0f} s (the limit is {limit:.0f} s)"
            if phase.seconds > limit and not phase.is_reported:
                phase.is_reported = True
                self._report(line)
            if phase.seconds > limit + self._grace_seconds:
                self._end(line)
        elif phase.seconds - phase.said >= _LINE_SECONDS and now - self.heard >= _LINE_SECONDS:
            phase.said = phase.seconds
            log.info("waiting for %s (%d min)", phase.name, phase.seconds // 60)


@contextmanager
def start_watchdog(world: World, folder: RunDirectory | None) -> Iterator[Watchdog]:
    """A watchdog with a thread of its own, which ends with the block.

    Every rank shows its stacks when its update hangs; rank 0 then writes status.json and ends its process, and
    the launcher the others.
    """
    watchdog = Watchdog(
        report=lambda line: _with_patience(lambda: _show_stacks(line, world.rank, folder if world.is_main else None)),
        end=(lambda line: _die(line, folder)) if world.is_main else _wait_for_the_launcher,
        grace_seconds=_GRACE_SECONDS if world.size > 1 else 0.0,
    )
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK_SECONDS):
            watchdog.look()

    ears = _Ears(watchdog)
    logging.getLogger("llm").addHandler(ears)
    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        ended.set()
        thread.join()
        logging.getLogger("llm").removeHandler(ears)


class _Ears(logging.Handler):
    """Notes when the run last said something: what speaks for itself needs no line about it."""

    def __init__(self, watchdog: Watchdog) -> None:
        super().__init__()
        self._watchdog = watchdog

    def emit(self, record: logging.LogRecord) -> None:
        """Notes the time."""
        self._watchdog.heard = time.monotonic()


def _show_stacks(line: str, rank: int, folder: RunDirectory | None) -> None:
    """To the standard error, and into the run's log; past logging, whose lock the hung thread may hold."""
    text = f"[rank {rank}] {line}; the stacks of all threads:\n".encode()
    os.write(2, text)
    faulthandler.dump_traceback(file=2, all_threads=True)
    if folder is not None and folder.log.exists():
        with open(folder.log, "ab", buffering=0) as file:
            file.write(text)
            faulthandler.dump_traceback(file=file.fileno(), all_threads=True)


def _die(line: str, folder: RunDirectory | None) -> None:
    if folder is not None and folder.status.exists():
        _with_patience(lambda: folder.write_final_status("failed", reason=line, exit_code=1))
    # Nothing else ends a process whose main thread does not come back.
    os._exit(1)


def _wait_for_the_launcher(line: str) -> None:
    """Rank 0 knows whether it saves or writes samples meanwhile, so that only it ends the run."""


def _with_patience(work: Callable[[], None]) -> None:
    """Does the work, but not for long: the disk may be what hangs."""
    thread = threading.Thread(target=work, name="last-words", daemon=True)
    thread.start()
    thread.join(_LAST_WORDS_SECONDS)
