"""The order of a run, and what it does when a signal or an error comes between its steps."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import llm.training.accelerator
import llm.training.callbacks.checkpointing
from llm.models.language_model import LanguageModel
from llm.training.updaters.base import StepReport, VoteResult
from llm.training.updaters.synchronous import SynchronousUpdater
from tests.conftest import Outcome

Train = Callable[..., Outcome]


@pytest.fixture
def killed() -> Iterator[list[int]]:
    """The SIGTERMs that would have killed this process."""
    signals: list[int] = []

    def catch(number: int, _: FrameType | None) -> None:
        signals.append(number)

    previous = signal.signal(signal.SIGTERM, catch)
    yield signals
    signal.signal(signal.SIGTERM, previous)


def test_signal_when_it_comes_during_a_save_after_another_ranks_stop_then_the_save_is_finished(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: list[int]
) -> None:
    # A launcher signals its ranks one after another: this rank learns of the stop from the others first, and gets its
    # own signal while it saves.
    update = SynchronousUpdater.update
    save = llm.training.callbacks.checkpointing.save_checkpoint

    def stopped_by_another(self: SynchronousUpdater, *words: Any, **more: Any) -> StepReport:
        return replace(update(self, *words, **more), votes=VoteResult(stop=True))

    def signalled(*words: Any, **more: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*words, **more)

    monkeypatch.setattr(SynchronousUpdater, "update", stopped_by_another)
    monkeypatch.setattr(llm.training.callbacks.checkpointing, "save_checkpoint", signalled)
    outcome = train(*tiny_options, "--output_dir", tmp_path / "run")
    assert outcome.code == 75, outcome.err
    assert killed == []
    assert (tmp_path / "run" / "checkpoints" / "step_1" / "manifest.json").exists()


def test_record_when_no_loss_since_the_last_one_was_finite_then_its_loss_is_none(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LanguageModel.forward
    calls: list[int] = []

    def poisoned(self: LanguageModel, *inputs: torch.Tensor | None) -> Any:
        loss, count = forward(self, *inputs)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 2 else loss), count

    monkeypatch.setattr(LanguageModel, "forward", poisoned)
    words = [*tiny_options, "--logging_steps", "1", "--output_dir", tmp_path / "run", "--max_train_steps", "3"]
    assert train(*words).code == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[1] is None
    assert all(loss is not None and loss > 0 for loss in (losses[0], losses[2]))
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["train_loss"] == losses[2]


def test_overwriting_when_the_model_is_read_from_the_folder_then_is_refused_and_nothing_is_removed(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(*tiny_options, "--output_dir", "run", "--max_train_steps", "1").code == 0
    before = {path.name for path in (tmp_path / "run").iterdir()}
    at = tiny_options.index("--config_name")
    words = [*tiny_options[:at], *tiny_options[at + 2 :], "--model_name_or_path", str(tmp_path / "run")]
    outcome = train(*words, "--output_dir", "run", "--overwrite_output_dir")
    assert outcome.code == 1
    assert "--model_name_or_path" in outcome.err
    assert {path.name for path in (tmp_path / "run").iterdir()} == before


def test_run_when_it_fails_after_its_first_updates_then_the_heap_is_unfrozen_and_memory_is_returned(
    train: Train, tiny_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = SynchronousUpdater.update
    frozen: list[int] = []
    heap = ["at the start"]

    def failing(self: SynchronousUpdater, batches: Any, step: int, **more: Any) -> StepReport:
        if step == 3:
            frozen.append(gc.get_freeze_count())
            heap.append("in an update")
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return update(self, batches, step, **more)

    monkeypatch.setattr(SynchronousUpdater, "update", failing)
    monkeypatch.setattr(llm.training.accelerator, "keep_freed_memory", lambda: heap.append("kept"))
    monkeypatch.setattr(llm.training.accelerator, "return_freed_memory", lambda: heap.append("returned"))
    assert train(*tiny_options, "--max_train_steps", 5).code == 1
    assert frozen[0] > 0 and gc.get_freeze_count() == 0
    assert heap == ["at the start", "kept", "in an update", "returned"]
