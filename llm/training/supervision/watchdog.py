"""Watchdog: an update that hangs ends the run with the stacks of all threads; other long waits are logged."""

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

_MIN_LIMIT_SECONDS = 300.0
# The first update compiles and starts the libraries of the device: how long an update takes is not known yet.
_FIRST_LIMIT_SECONDS = 1800.0
# The limit in units of the median update.
_LIMIT_FACTOR = 20
# The median is over this many of the newest updates.
_NUM_MEASURED_UPDATES = 101
_LOG_SECONDS = 60.0
_CHECK_SECONDS = 1.0
# A process that was suspended, or whose computer slept, does not hang: a longer pause between two checks counts as
# this much.
_MAX_CHECK_SECONDS = 5.0
# Rank 0 ends the run, and then the launcher ends the other ranks: they have this long to write their stacks first.
_EXIT_GRACE_SECONDS = 10.0
# The longest wait for writes to a disk that may hang.
_WRITE_TIMEOUT_SECONDS = 20.0


class _Phase:
    """An activity of the run, and how long it has lasted.

    Attributes:
        name: for the log.
        is_update: whether it is an update, which has a time limit.
        seconds: duration so far.
        logged_seconds: `seconds` at its newest log line.
        is_reported: whether it was reported as hanging.
    """

    def __init__(self, name: str, *, is_update: bool = False) -> None:
        self.name = name
        self.is_update = is_update
        self.seconds = 0.0
        self.logged_seconds = 0.0
        self.is_reported = False


class Watchdog:
    """Measures how long each activity of a run lasts; its owner calls `check` once a second.

    Args:
        report: called once with a line about an update that hangs.
        end: called after that with the same line, when the run must end.
        grace_seconds: time between the two calls.
        clock: returns the time in seconds from any fixed origin.

    Attributes:
        last_log_time: time of the newest log record, by `clock`.
    """

    def __init__(
        self,
        report: Callable[[str], None],
        end: Callable[[str], None],
        *,
        grace_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report = report
        self._end = end
        self._grace_seconds = grace_seconds
        self._clock = clock
        self._phase = _Phase("the start")
        self._last_check_time = clock()
        self.last_log_time = self._last_check_time
        self._update_seconds: deque[float] = deque(maxlen=_NUM_MEASURED_UPDATES)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Log `waiting for <name>` once a minute while the block runs."""
        outer = self._phase
        self._phase = _Phase(name)
        try:
            yield
        finally:
            self._phase = outer

    @contextmanager
    def during_update(self) -> Iterator[None]:
        """Time the block, one weight update; beyond `limit_seconds` the stacks are written and the run ends."""
        outer = self._phase
        self._phase = _Phase("an update", is_update=True)
        started = self._clock()
        try:
            yield
            self._update_seconds.append(self._clock() - started)
        finally:
            self._phase = outer

    @property
    def limit_seconds(self) -> float:
        """The time limit of an update: 20 times the median update, at least 300 s; 1800 s for the first update."""
        if not self._update_seconds:
            return _FIRST_LIMIT_SECONDS
        return max(_MIN_LIMIT_SECONDS, _LIMIT_FACTOR * statistics.median(list(self._update_seconds)))

    def check(self) -> None:
        """Log what the run waits for; report and end an update that exceeds its limit."""
        now = self._clock()
        phase = self._phase
        phase.seconds += min(now - self._last_check_time, _MAX_CHECK_SECONDS)
        self._last_check_time = now
        if phase.is_update:
            limit = self.limit_seconds
            line = f"no update finished for {phase.seconds:.0f} s (the limit is {limit:.0f} s)"
            if phase.seconds > limit and not phase.is_reported:
                phase.is_reported = True
                self._report(line)
            if phase.seconds > limit + self._grace_seconds:
                self._end(line)
        elif phase.seconds - phase.logged_seconds >= _LOG_SECONDS and now - self.last_log_time >= _LOG_SECONDS:
            phase.logged_seconds = phase.seconds
            log.info("waiting for %s (%d min)", phase.name, phase.seconds // 60)


@contextmanager
def start_watchdog(world: World, run_dir: RunDirectory | None) -> Iterator[Watchdog]:
    """Run a watchdog in a thread of its own while the block runs.

    Every rank writes its stacks when its update hangs; rank 0 then writes status.json and ends its process, and the
    launcher ends the others.

    Args:
        world: the processes of the run.
        run_dir: the run's folder; None if nothing is kept.
    """

    def report(line: str) -> None:
        _with_timeout(lambda: _write_stacks(line, world.rank, run_dir if world.is_main else None))

    def end(line: str) -> None:
        # Only rank 0 ends the run, because only rank 0 knows whether it saves or draws samples meanwhile.
        if world.is_main:
            _exit(line, run_dir)

    watchdog = Watchdog(report, end, grace_seconds=_EXIT_GRACE_SECONDS if world.size > 1 else 0.0)
    ended = threading.Event()

    def check_regularly() -> None:
        while not ended.wait(_CHECK_SECONDS):
            watchdog.check()

    handler = _LogTimeHandler(watchdog)
    logging.getLogger("llm").addHandler(handler)
    thread = threading.Thread(target=check_regularly, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        ended.set()
        thread.join()
        logging.getLogger("llm").removeHandler(handler)


class _LogTimeHandler(logging.Handler):
    """Records the time of the newest log record: an activity that logs lines needs no line of the watchdog."""

    def __init__(self, watchdog: Watchdog) -> None:
        super().__init__()
        self._watchdog = watchdog

    def emit(self, record: logging.LogRecord) -> None:
        """Record the time."""
        self._watchdog.last_log_time = time.monotonic()


def _write_stacks(line: str, rank: int, run_dir: RunDirectory | None) -> None:
    """Write the stacks to the standard error and log.txt, past logging, whose lock the hanging thread may hold."""
    header = f"[rank {rank}] {line}; the stacks of all threads:\n".encode()
    os.write(2, header)
    faulthandler.dump_traceback(file=2, all_threads=True)
    if run_dir is not None and run_dir.log.exists():
        with open(run_dir.log, "ab", buffering=0) as file:
            file.write(header)
            faulthandler.dump_traceback(file=file.fileno(), all_threads=True)


def _exit(line: str, run_dir: RunDirectory | None) -> None:
    if run_dir is not None and run_dir.status.exists():
        _with_timeout(lambda: run_dir.write_final_status("failed", reason=line, exit_code=1))
    # No other call ends a process whose main thread hangs in C code.
    os._exit(1)


def _with_timeout(work: Callable[[], None]) -> None:
    """Do the work, but wait for it only a limited time, because the disk may be the cause of the hang."""
    thread = threading.Thread(target=work, name="watchdog-write", daemon=True)
    thread.start()
    thread.join(_WRITE_TIMEOUT_SECONDS)
