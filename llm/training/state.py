"""Counters of a run that a checkpoint keeps, and means since the last record."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from llm.training.updaters.base import StepReport


@dataclass
class LossWindow:
    """Sums over the updates since the last record; the loss over those whose loss was finite.

    Attributes:
        loss: sum of the losses, nats a token each.
        num_losses: updates whose loss was finite.
        num_steps: all updates.
        seconds: spent in them.
        data_seconds: of these, spent waiting for blocks.
    """

    loss: float = 0.0
    num_losses: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0


@dataclass
class TrainState:
    """Counters of the whole run.

    Attributes:
        step: finished updates, skipped ones included.
        tokens: tokens predicted in them; with a document mask or a loss mask an upper bound.
        num_skipped: updates whose gradient was not finite.
        num_skipped_in_a_row: skipped updates since the last good one; those in which the loss scale of fp16 could still
            fall do not count.
        train_seconds: time spent in updates (not in evaluation or saving), over all starts of the run.
        train_loss: nats a token over the updates of the newest record; None before the first.
        eval_loss: nats a token of the newest evaluation; None before the first.
        eval_step: the update after which that evaluation was made.
        best_eval_loss: the lowest loss of all evaluations; None before the first.
        window: sums since the last record.
    """

    step: int = 0
    tokens: int = 0
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0
    train_seconds: float = 0.0
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_step: int | None = None
    best_eval_loss: float | None = None
    window: LossWindow = field(default_factory=LossWindow)

    def add(self, report: StepReport, *, num_tokens: int, seconds: float, data_seconds: float = 0.0) -> None:
        """Count one update.

        Args:
            report: of the update.
            num_tokens: predicted in it.
            seconds: that it took.
            data_seconds: of these, spent waiting for blocks.
        """
        self.step += 1
        self.tokens += num_tokens
        self.train_seconds += seconds
        if report.skipped:
            self.num_skipped += 1
        is_failure = report.skipped and not report.loss_scale_is_falling
        self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if is_failure else 0
        self.window.num_steps += 1
        self.window.seconds += seconds
        self.window.data_seconds += data_seconds
        if math.isfinite(report.loss):
            self.window.loss += report.loss
            self.window.num_losses += 1

    def add_evaluation(self, loss: float) -> bool:
        """Note an evaluation of the weights as they are, in nats a token; return whether it is the best so far."""
        self.eval_loss = loss
        self.eval_step = self.step
        is_best = math.isfinite(loss) and (self.best_eval_loss is None or loss < self.best_eval_loss)
        if is_best:
            self.best_eval_loss = loss
        return is_best

    def to_json(self) -> dict[str, Any]:
        """Return all counters as values that JSON holds."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """Return the counters that `to_json` gave."""
        window = LossWindow(**values["window"])
        return cls(**(values | {"window": window}))
