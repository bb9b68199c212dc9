"""The loop: one update after another, and whatever is due after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from llm.data.batches.loader import Batch
from llm.training.state import TrainState
from llm.training.triggers import Trigger
from llm.training.updaters.synchronous import StepReport


class Updater(Protocol):
    """What the loop drives: the central updater, or another one with the same verbs."""

    def update(
        self,
        micro_batches: Sequence[Batch],
        step: int,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        should_save: Callable[[], bool] = lambda: False,
    ) -> StepReport:
        """One update of the weights; an abandoned one has changed nothing."""


@dataclass(frozen=True)
class Event:
    """Something that happens after certain updates; `act` gets the newest report."""

    due: Trigger
    act: Callable[[StepReport], None]


def run_updates(
    updater: Updater,
    batches: Iterator[list[Batch]],
    progress: TrainState,
    events: Sequence[Event],
    *,
    num_steps: int,
    tokens_per_step: int,
    should_stop: Callable[[], bool],
    should_save: Callable[[], bool] = lambda: False,
    watched: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> bool:
    """Updates until `num_steps` are done, or until some rank was asked to stop, or the batches end.

    An update that the stop came into is abandoned; it is as if it had not begun.

    Args:
        updater: makes the updates.
        batches: this rank's micro-batches, one list an update, from update `progress.step` on; on every rank
            they may end early, at the same update.
        progress: counted up.
        events: asked, in their order, after every update.
        num_steps: updates of the whole run.
        tokens_per_step: tokens predicted in one update.
        should_stop: whether this rank was asked to stop.
        should_save: whether this rank wants a checkpoint after the update that is being made.
        watched: what each update is made in.

    Returns:
        Whether all updates were made.
    """
    while progress.step < num_steps:
        started = time.perf_counter()
        micro_batches = next(batches, None)
        if micro_batches is None:
            return False
        data_seconds = time.perf_counter() - started
        with watched():
            report = updater.update(micro_batches, progress.step, should_stop=should_stop, should_save=should_save)
        if report.abandoned:
            return False
        seconds = time.perf_counter() - started
        progress.add(report, num_tokens=tokens_per_step, seconds=seconds, data_seconds=data_seconds)
        for event in events:
            if event.due(progress.step):
                event.act(report)
        if report.stop:
            return progress.step == num_steps
    return True
