"""Time of K-FAC in a run, from marks that are recorded without waiting for the device."""

from __future__ import annotations

import statistics
from itertools import pairwise

from llm.system.device_timer import DeviceTimer
from llm.training.updaters.preconditioning import Preconditioner


def newest_seconds(preconditioner: Preconditioner, timer: DeviceTimer, num_steps: int) -> float | None:
    """Return the total seconds of the newest K-FAC steps, without their factor updates in the backward passes.

    Args:
        preconditioner: records when each of its steps began and ended.
        timer: of the device that recorded these times.
        num_steps: number of the newest steps that are summed.

    Returns:
        None if the preconditioner does not measure its steps.
    """
    if preconditioner.timings is None:
        return None
    timer.wait()
    timings = list(preconditioner.timings)[-num_steps:]
    return sum(timer.seconds(timing.begin, timing.end) for timing in timings)


def cost_lines(preconditioner: Preconditioner, timer: DeviceTimer) -> list[str]:
    """Return a line such as `K-FAC took 3.2 ms an update, 41% of an update without it (measured over 200 updates)`.

    Factor capture runs inside the backward pass and cannot be timed alone. Its cost is estimated as the difference
    between updates with and without it, from the end of one K-FAC step to the beginning of the next. The list is empty
    for a short run, and for a preconditioner that does not measure its steps.

    Args:
        preconditioner: records when each of its steps began and ended.
        timer: of the device that recorded these times.
    """
    intervals = preconditioner.intervals
    timings = list(preconditioner.timings or ())
    timings = timings[len(timings) % intervals.period :]
    if len(timings) < 2 * intervals.period or len(timings) < 3:
        return []
    timer.wait()
    step_seconds = statistics.fmean(timer.seconds(timing.begin, timing.end) for timing in timings)
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for previous, timing in pairwise(timings):
        has_factor_update = timing.step % intervals.factors == 0
        gaps[has_factor_update].append(timer.seconds(previous.end, timing.begin))
    if not gaps[False]:
        without = statistics.median(gaps[True])
        return [
            f"K-FAC took {step_seconds * 1e3:.1f} ms an update, and its factor update in every backward pass, which "
            f"python -m llm.bench tells apart; all else {without * 1e3:.1f} ms (measured over {len(timings)} updates)"
        ]
    without = statistics.median(gaps[False])
    capture_seconds = max(0.0, statistics.median(gaps[True]) - without) / intervals.factors
    total = step_seconds + capture_seconds
    return [
        f"K-FAC took {total * 1e3:.1f} ms an update, {total / without:.0%} of an update without it "
        f"(measured over {len(timings)} updates)"
    ]
