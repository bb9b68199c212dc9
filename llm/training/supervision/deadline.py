"""The deadline of a run: the end of `--max_time`, or the end of the scheduler's job less a margin for the last save."""

from __future__ import annotations

import time
from collections.abc import Callable

from llm.clusters.scheduler import job_end
from llm.config.durations import parse_duration
from llm.config.options import TrainingOptions
from llm.distributed.world import World

# Slurm may send its signal up to a minute early, and a checkpoint has to be written in the remaining time.
_MIN_MARGIN_SECONDS = 120.0
# The margin in units of the longest save: the last save may have to wait for another save, and saves vary in speed.
_MARGIN_SAVES = 3


class Deadline:
    """The earlier of two times, each of which may be missing: the end of `--max_time` and the job's walltime.

    The run stops before the walltime by a margin: the larger of 120 s and three times the longest save so far, but at
    most half of the time that was left at the start, so that a start in a short job makes some updates.

    Args:
        max_time: end of `--max_time` in seconds since the epoch; None if the option is not given.
        walltime: end of the job in seconds since the epoch; None outside a job.
        clock: returns the current time in seconds since the epoch.
    """

    def __init__(
        self, max_time: float | None = None, walltime: float | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._max_time = max_time
        self._walltime = walltime
        self._clock = clock
        self._largest_margin = 0.0 if walltime is None else (walltime - clock()) / 2
        self._save_seconds = 0.0

    @property
    def margin_seconds(self) -> float:
        """Seconds before the walltime at which the run stops."""
        return min(max(_MIN_MARGIN_SECONDS, _MARGIN_SAVES * self._save_seconds), self._largest_margin)

    def record_save(self, seconds: float) -> None:
        """Record that a save took this many seconds."""
        self._save_seconds = max(self._save_seconds, seconds)

    def reason(self) -> str | None:
        """Return `max_time` or `walltime` once the run must stop, None before."""
        now = self._clock()
        if self._max_time is not None and now >= self._max_time:
            return "max_time"
        if self._walltime is not None and now >= self._walltime - self.margin_seconds:
            return "walltime"
        return None

    def lines(self) -> list[str]:
        """Return one log line for each of the two times that is set."""
        lines = []
        if self._max_time is not None:
            lines.append(f"deadline: {_format_time(self._max_time)} (--max_time)")
        if self._walltime is not None:
            lines.append(
                f"deadline: {_format_time(self._walltime - self.margin_seconds)}, {self.margin_seconds:.0f} s before "
                "the job's walltime; earlier if saves take long"
            )
        return lines


def find_deadline(options: TrainingOptions, world: World, *, started: float) -> Deadline:
    """Return the deadline of this start, which is the same on every rank; rank 0 asks the scheduler.

    Args:
        options: for `--max_time`.
        world: the processes of the run.
        started: start of this process in seconds since the epoch; `--max_time` counts from the start of rank 0.
    """
    walltime, main_started = world.broadcast((job_end() if world.is_main else None, started))
    max_time = None if options.max_time is None else main_started + parse_duration(options.max_time)
    return Deadline(max_time, walltime)


def _format_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
