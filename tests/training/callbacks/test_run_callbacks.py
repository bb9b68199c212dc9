"""The order of the callbacks after an update, and when they are due."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm.training.callbacks.checkpointing import CheckpointingCallback
from llm.training.callbacks.evaluation import EvaluationCallback
from llm.training.callbacks.metrics import MetricsCallback
from llm.training.callbacks.sampling import SamplingCallback
from llm.training.run_dir.console import ProgressBar
from llm.training.updaters.synchronous import SynchronousUpdater
from tests.conftest import Outcome

Train = Callable[..., Outcome]


def test_callbacks_when_all_are_due_after_an_update_then_run_in_their_order(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def record(owner: type, method: str) -> None:
        original = getattr(owner, method)

        def recorded(self: Any, *words: Any, **more: Any) -> Any:
            calls.append(f"{owner.__name__}.{method}")
            return original(self, *words, **more)

        monkeypatch.setattr(owner, method, recorded)

    record(SynchronousUpdater, "update")
    record(MetricsCallback, "check_health")
    record(MetricsCallback, "record")
    record(EvaluationCallback, "run")
    record(CheckpointingCallback, "run")
    record(SamplingCallback, "run")
    record(ProgressBar, "advance")
    every_update = [
        *("--logging_steps", "1", "--eval_steps", "1", "--checkpointing_steps", "1", "--sample_steps", "1"),
        *("--max_eval_batches", "1", "--max_train_steps", "2", "--output_dir", tmp_path / "run"),
    ]
    assert train(*tiny_options, *every_update).code == 0
    order = [
        "SynchronousUpdater.update",
        "MetricsCallback.check_health",
        "MetricsCallback.record",
        "EvaluationCallback.run",
        "CheckpointingCallback.run",
        "SamplingCallback.run",
        "ProgressBar.advance",
    ]
    # After the last update the samples come at the end of the run.
    last = [call for call in order if call != "SamplingCallback.run"]
    assert calls == [*order, *last, "SamplingCallback.run"]
