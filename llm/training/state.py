"""How far the run is: counters that a checkpoint keeps, and means since the last record."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from llm.training.updaters.synchronous import StepReport


@dataclass
class LossWindow:
    """Sums over the updates since the last record; the loss over those where it was finite."""

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
        tokens: tokens predicted in them.
        num_skipped: updates whose gradient was not finite.
        num_skipped_in_a_row: of these, the ones since the last that was.
        train_seconds: time spent in updates (not in evaluation or saving), over all starts of the run.
        train_loss: nats a token over the updates of the newest record; None before the first.
        eval_loss: nats a token of the newest evaluation; None before the first.
        eval_step: the update after which it was made.
        best_eval_loss: the lowest of all evaluations; None before the first.
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
        """Counts one update that took `seconds`, of which it waited `data_seconds` for its blocks."""
        self.step += 1
        self.tokens += num_tokens
        self.train_seconds += seconds
        self.num_skipped += report.skipped
        self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if report.skipped else 0
        self.window.num_steps += 1
        self.window.seconds += seconds
        self.window.data_seconds += data_seconds
        if math.isfinite(report.loss):
            self.window.loss += report.loss
            self.window.num_losses += 1

    def add_evaluation(self, loss: float) -> bool:
        """Notes the evaluation of the weights as they are; whether it is the best so far."""
        self.eval_loss, self.eval_step = loss, self.step
        is_best = math.isfinite(loss) and (self.best_eval_loss is None or loss < self.best_eval_loss)
        if is_best:
            self.best_eval_loss = loss
        return is_best

    def state(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self)

    @classmethod
    def of(cls, state: dict[str, Any]) -> TrainState:
        """Takes back what `state` gave."""
        return cls(**{**state, "window": LossWindow(**state["window"])})
