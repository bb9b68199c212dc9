"""Runs of the trainer in this process, each as its curve: the loss after so many updates, tokens and CPU seconds."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Sequence
from typing import Any

import llm.training.run
from llm.trainers.gpt import main as trainer
from llm.training.callbacks.evaluation import EvaluationCallback

Point = dict[str, Any]


def record(words: Sequence[str]) -> list[Point]:
    """One run: `step`, `tokens`, `cpu_seconds` and `eval_loss` at every evaluation.

    The clock is that of the training alone: from before the first update, its data and log lines included; no start-up
    and no evaluations.

    Raises:
        SystemExit: the trainer failed; its last words are in the message.
    """
    module: Any = llm.training.run
    evaluate, run_updates = EvaluationCallback.run, module.run_updates
    curve: list[Point] = []
    began = used = 0.0

    def begin(*given: Any, **named: Any) -> bool:
        nonlocal began
        began = time.process_time()
        return bool(run_updates(*given, **named))

    def stand_still(self: EvaluationCallback, *given: Any, **named: Any) -> None:
        nonlocal began, used
        used += time.process_time() - began
        evaluate(self, *given, **named)
        progress = self._context.state
        curve.append(
            {"step": progress.step, "tokens": progress.tokens, "cpu_seconds": used, "eval_loss": progress.eval_loss}
        )
        began = time.process_time()

    said = io.StringIO()
    module.run_updates, EvaluationCallback.run = begin, stand_still  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = trainer(list(words))
    finally:
        module.run_updates, EvaluationCallback.run = run_updates, evaluate  # type: ignore[method-assign]
    if code:
        sys.exit(f"the trainer ended with code {code}:\n{said.getvalue()[-2000:]}")
    return curve
