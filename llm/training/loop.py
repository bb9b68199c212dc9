"""The training loop: one update after another, and the callbacks that are due after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from llm.data.batches.loader import Batch
from llm.training.state import TrainState
from llm.training.triggers import Trigger
from llm.training.updaters.base import StepReport, StepVotes, Updater


@dataclass(frozen=True)
class Callback:
    """Work that is done after certain updates, on all ranks.

    Attributes:
        trigger: says after which updates.
        run: called with the report of the newest update.
    """

    trigger: Trigger
    run: Callable[[StepReport], None]


def run_updates(
    updater: Updater,
    batches: Iterator[list[Batch]],
    state: TrainState,
    callbacks: Sequence[Callback],
    *,
    num_steps: int,
    tokens_per_step: int,
    votes: StepVotes,
    watched: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> bool:
    """Make updates until `num_steps` are done, the ranks agree to stop, or the batches end.

    An update that a stop interrupted is abandoned, as if it had not begun.

    Args:
        updater: makes the updates.
        batches: this rank's micro-batches, one list an update, from update `state.step` on; on all ranks they may end
            early, at the same update.
        state: counters of the run, which are advanced.
        callbacks: run in this order after every update that triggers them.
        num_steps: updates of the whole run.
        tokens_per_step: tokens predicted in one update; with a document mask or a loss mask an upper bound.
        votes: what this rank asks of all ranks.
        watched: the context that each update is made in.

    Returns:
        Whether all updates were made.
    """
    while state.step < num_steps:
        started = time.perf_counter()
        micro_batches = next(batches, None)
        if micro_batches is None:
            return False
        data_seconds = time.perf_counter() - started
        with watched():
            report = updater.update(micro_batches, state.step, votes=votes)
        if report.abandoned:
            return False
        seconds = time.perf_counter() - started
        state.add(report, num_tokens=tokens_per_step, seconds=seconds, data_seconds=data_seconds)
        for callback in callbacks:
            if callback.trigger(state.step):
                callback.run(report)
        # None: no votes were exchanged in this update, and the last ones were acted on when they came.
        if report.votes is not None and report.votes.stop:
            return state.step == num_steps
    return True
