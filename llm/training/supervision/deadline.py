"""When a run must have ended: after `--max_time`, or before the scheduler ends its job."""

from __future__ import annotations

import time
from collections.abc import Callable

from llm.clusters.scheduler import job_end
from llm.config.durations import parse_duration
from llm.config.options import TrainingOptions
from llm.distributed.world import World

# Slurm may send its signal up to a minute early, and a checkpoint has to be written in what is left.
_LEAST_MARGIN_SECONDS = 120.0
# A save may have to wait for the one before it, takes its own time, and is not always equally fast.
_SAVES_OF_MARGIN = 3


class Deadline:
    """The earlier of two moments; none of them may be there.

    The walltime is kept with a margin: the largest of 120 s and three times the longest save so far, but at
    most half of what was left at the start, so that a start in a short job gets something done.
    """

    def __init__(
        self, max_time: float | None = None, walltime: float | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Both in seconds since the epoch, as is `clock`."""
        self._max_time, self._walltime, self._clock = max_time, walltime, clock
        self._largest_margin = 0.0 if walltime is None else (walltime - clock()) / 2
        self._save_seconds = 0.0

    @property
    def margin_seconds(self) -> float:
        """How long before the walltime the run stops."""
        return min(max(_LEAST_MARGIN_SECONDS, _SAVES_OF_MARGIN * self._save_seconds), self._largest_margin)

    def record_save(self, seconds: float) -> None:
        """Learns how long a save took."""
        self._save_seconds = max(self._save_seconds, seconds)

    def reason(self) -> str | None:
        """`max_time` or `walltime` once the run must stop, None before."""
        now = self._clock()
        if self._max_time is not None and now >= self._max_time:
            return "max_time"
        if self._walltime is not None and now >= self._walltime - self.margin_seconds:
            return "walltime"
        return None

    def lines(self) -> list[str]:
        """One line for each moment that there is."""
        found = []
        if self._max_time is not None:
            found.append(f"deadline: {_clock_time(self._max_time)} (--max_time)")
        if self._walltime is not None:
            found.append(
                f"deadline: {_clock_time(self._walltime - self.margin_seconds)}, {self.margin_seconds:.0f} s before "
                "the job's walltime; more where saving takes long"
            )
        return found


def find_deadline(options: TrainingOptions, world: World, *, started: float) -> Deadline:
    """The deadline of this start, the same on every rank; rank 0 asks the scheduler.

    Args:
        options: for `--max_time`.
        world: the processes.
        started: when this process began, in seconds since the epoch; `--max_time` counts from there.
    """
    end, began = world.broadcast((job_end() if world.is_main else None, started))
    return Deadline(None if options.max_time is None else began + parse_duration(options.max_time), end)


def _clock_time(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
