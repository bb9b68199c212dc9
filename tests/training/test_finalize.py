"""The end of a run: what is done after the last update, in which order, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llm.training.finalize
from llm.config.errors import Stopped, UserError
from llm.training.callbacks.evaluation import EvaluationCallback
from llm.training.callbacks.metrics import MetricsCallback
from llm.training.callbacks.run_callbacks import RunCallbacks
from llm.training.finalize import finish
from tests.training.run_context import BLOCK_SIZE, make_context


class Calls:
    """Stands for the callbacks that are called at the end; `made` lists the calls."""

    def __init__(self, made: list[str], *, stop: bool = False) -> None:
        self.made = made
        self.stop = stop

    def run(self, *, num_samples: int) -> None:
        self.made.append(f"{num_samples} samples")
        if self.stop:
            raise Stopped("SIGTERM")

    def save_last(self, reason: str) -> None:
        self.made.append(f"checkpoint: {reason}")


@pytest.fixture
def finished(tiny_gpt2: Any, byte_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`finished(**options)` finishes a run of 10 updates, and returns its context and the calls in their order."""

    def run(*, stop: bool = False, keep: bool = True, command: str = "gpt --seed 7", **options: Any) -> Any:
        context = make_context(tiny_gpt2, byte_tokenizer, run_dir=tmp_path / "run" if keep else None, **options)
        context.state.step = 10
        context.state.tokens = 10 * 4 * BLOCK_SIZE
        context.state.train_seconds = 4.0
        context.state.train_loss = 2.5
        calls: Any = Calls(context.updater.calls, stop=stop)
        export = llm.training.finalize.export_model

        def record_export(*arguments: Any, **named: Any) -> None:
            context.updater.calls.append("export")
            export(*arguments, **named)

        monkeypatch.setattr(llm.training.finalize, "export_model", record_export)
        evaluation = EvaluationCallback(context)
        callbacks = RunCallbacks(
            metrics=MetricsCallback(context), evaluation=evaluation, sampling=calls, checkpointing=calls
        )
        finish(context, callbacks, command=command)
        return context, context.updater.calls, evaluation

    return run


def test_finish_when_all_updates_were_made_then_folder_results_card_and_status_are_written(
    finished: Any, tiny_gpt2: Any, log_lines: Callable[[], list[str]]
) -> None:
    context, calls, evaluation = finished(sample_steps=5)
    assert calls == [
        "evaluation_model", "3 samples", "checkpoint: end", "evaluation_model", "full_weights", "export",
    ]  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(context.run_dir.path)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), tiny_gpt2.parameters(), strict=True))
    results = json.loads(context.run_dir.results.read_text())
    assert results == {
        "step": 10,
        "train_loss": 2.5,
        "tokens": 320,
        "tokens_per_second": 80.0,
        "train_seconds": 4.0,
        "num_skipped": 0,
        "num_parameters": tiny_gpt2.num_parameters(),
        "seed": 7,
        "data_hash": "hash of the text",
        "tokenizer_hash": "hash of the tokenizer",
        "ledger": asdict(context.dataset.ledger(BLOCK_SIZE)),
        "num_unreached_tokens": 0,
        "eval_loss": evaluation.newest.loss,
        "perplexity": evaluation.newest.perplexity,
        "bits_per_byte": evaluation.newest.bits_per_byte,
        "num_eval_tokens": 8 * BLOCK_SIZE,
    }
    card = context.run_dir.model_card.read_text()
    assert "gpt --seed 7" in card and "GPT2LMHeadModel" in card
    assert "muon_momentum" not in card and "kfac_damping" not in card  # options that nothing read
    status = json.loads(context.run_dir.status.read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("done", 10, 0)
    lines = log_lines()
    assert "recording updater: finished" in lines
    assert any(line.startswith("done: ") and "from_pretrained" in line for line in lines)


def test_finish_when_nothing_is_kept_then_evaluates_and_ends(finished: Any) -> None:
    _, calls, evaluation = finished(keep=False)
    assert calls == ["evaluation_model"]
    assert evaluation.newest is not None


def test_finish_when_stopped_while_sampling_then_the_model_is_exported_all_the_same(finished: Any) -> None:
    context, calls, _ = finished(sample_steps=5, stop=True)
    assert calls[-1] == "export"
    assert json.loads(context.run_dir.status.read_text())["state"] == "done"


def test_finish_when_the_curves_cannot_be_drawn_then_the_run_is_done(
    finished: Any, monkeypatch: pytest.MonkeyPatch, log_lines: Callable[[], list[str]]
) -> None:
    def fail(*_: Any) -> None:
        raise UserError("matplotlib is not installed")

    monkeypatch.setattr(llm.training.finalize, "draw_curves", fail)
    context, _, _ = finished()
    assert "no curves.png: matplotlib is not installed" in log_lines()
    assert json.loads(context.run_dir.status.read_text())["state"] == "done"


def test_finish_when_the_push_fails_then_the_folder_is_complete_but_the_run_is_not_done(
    finished: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(folder: Path, *_: Any, **__: Any) -> None:
        raise UserError("the Hub cannot be reached")

    monkeypatch.setattr(llm.training.finalize, "push_folder", fail)
    with pytest.raises(UserError, match="Hub"):
        finished(push_to_hub=True)
    assert {"model.safetensors", "README.md", "all_results.json"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert not (tmp_path / "run" / "status.json").exists()
