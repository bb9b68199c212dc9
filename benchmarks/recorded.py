"""Run the trainer in this process and record its curve: loss over steps, tokens and CPU seconds."""

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


def record(args: Sequence[str]) -> list[Point]:
    """Run the trainer and return `step`, `tokens`, `cpu_seconds` and `eval_loss` at every evaluation.

    `cpu_seconds` is the time of the training alone, from before the first step: it includes data and log lines, but
    neither the start of the program nor evaluations.

    Raises:
        SystemExit: the trainer failed; the message has the end of its output.
    """
    module: Any = llm.training.run
    evaluate = EvaluationCallback.run
    run_updates = module.run_updates
    curve: list[Point] = []
    start = 0.0
    cpu_seconds = 0.0

    def start_clock_and_run(*args: Any, **kwargs: Any) -> bool:
        nonlocal start
        start = time.process_time()
        return bool(run_updates(*args, **kwargs))

    def evaluate_off_the_clock(self: EvaluationCallback, *args: Any, **kwargs: Any) -> None:
        nonlocal start, cpu_seconds
        cpu_seconds += time.process_time() - start
        evaluate(self, *args, **kwargs)
        state = self._context.state
        curve.append(
            {"step": state.step, "tokens": state.tokens, "cpu_seconds": cpu_seconds, "eval_loss": state.eval_loss}
        )
        start = time.process_time()

    output = io.StringIO()
    module.run_updates = start_clock_and_run
    EvaluationCallback.run = evaluate_off_the_clock  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = trainer(list(args))
    finally:
        module.run_updates = run_updates
        EvaluationCallback.run = evaluate  # type: ignore[method-assign]
    if code:
        sys.exit(f"the trainer ended with code {code}:\n{output.getvalue()[-2000:]}")
    return curve
