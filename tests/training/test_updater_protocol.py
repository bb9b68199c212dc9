"""The trainer under an updater that it does not know: everything goes through the `Updater` protocol, on all ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import keep_only
from tests.trainers.test_gpt import Train, records

SCRIPT = Path(__file__).with_name("sharded_trainer.py")
SGD = (
    "--optim",
    "sgd",
    "--adam_beta1",
    "0.9",
    "--weight_decay",
    "0",
    "--max_grad_norm",
    "0",
    "--learning_rate",
    "0.05",
)
SGD += ("--lr_scheduler_type", "constant")
VERBS = {"update", "evaluation_model", "full_weights", "state", "gather"}


@pytest.fixture
def options(tiny_options: list[str]) -> list[str]:
    """A run of 12 updates that records, evaluates, samples and saves; 3 evaluation batches for 2 ranks."""
    return [
        *tiny_options, *SGD, "--max_train_steps", "12", "--per_device_train_batch_size", "2", "--eval_steps", "4",
        "--gradient_accumulation_steps", "2", "--checkpointing_steps", "4", "--sample_steps", "6",
        "--logging_steps", "1", "--per_device_eval_batch_size", "4", "--max_eval_batches", "3",
    ]  # fmt: skip


def run(folder: Path, *words: object, num_ranks: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), str(SCRIPT), str(folder), *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=170, check=False, env=os.environ | environment
    )


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [record[key] for record in records(folder) if key in record]


def results(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "all_results.json").read_text())
    return values


def counts(folder: Path) -> list[dict[str, int]]:
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_run_when_the_updater_shards_weights_then_trains_saves_resumes_evaluates_samples_and_exports(
    train: Train, options: list[str], tmp_path: Path
) -> None:
    plain = [*options, "--per_device_train_batch_size", "4"]  # the same global batch on one rank
    assert train(*plain, "--output_dir", tmp_path / "plain").code == 0
    outcome = run(tmp_path / "counts", *options, "--output_dir", tmp_path / "sharded")
    assert outcome.returncode == 0, outcome.stderr
    # The arithmetic is that of the synchronous updater, whatever holds the weights.
    for key in ("loss", "eval_loss"):
        assert losses(tmp_path / "sharded", key) == pytest.approx(losses(tmp_path / "plain", key), rel=1e-5)
    assert losses(tmp_path / "sharded", "samples") == losses(tmp_path / "plain", "samples")
    assert results(tmp_path / "sharded")["num_eval_tokens"] == results(tmp_path / "plain")["num_eval_tokens"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "sharded"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    # Every collective verb was called, and equally often on both ranks.
    first, second = counts(tmp_path / "counts")
    assert first == second
    assert first.keys() >= VERBS
    assert first["update"] == 12
    assert "sharded: begins on 2 ranks" in outcome.stdout
    assert "sharded: ended on 2 ranks" in outcome.stdout

    # Resumed in the middle, on two ranks and then on one: the same losses, from state that was saved in shards.
    whole = losses(tmp_path / "sharded")
    for num_ranks in (2, 1):
        keep_only(tmp_path / "sharded", 8)
        more = ["--resume_from_checkpoint", *(["--per_device_train_batch_size", "4"] if num_ranks == 1 else [])]
        words = [*options, *more, "--output_dir", tmp_path / "sharded"]
        outcome = run(tmp_path / f"resumed_{num_ranks}", *words, num_ranks=num_ranks)
        assert outcome.returncode == 0, outcome.stderr
        assert "resumed from step 8" in outcome.stdout
        assert losses(tmp_path / "sharded") == pytest.approx(whole, rel=1e-5)
    first, second = counts(tmp_path / "resumed_2")
    assert first == second
    assert first["load"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 6, 9])
def test_run_when_one_rank_alone_is_asked_to_stop_then_no_rank_skips_a_pass_and_all_is_saved(
    options: list[str], tmp_path: Path, stop_at: int
) -> None:
    # Somewhere between updates, in one and in an evaluation: every question that this rank alone answers with yes.
    folder = tmp_path / "run"
    outcome = run(tmp_path / "counts", "--stop_at", stop_at, *options, "--output_dir", folder)
    first, second = counts(tmp_path / "counts")
    assert first == second
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 75), outcome.stdout + outcome.stderr
    assert f"step_{status['step']}" in {path.name for path in (folder / "checkpoints").iterdir()}


@pytest.mark.slow
def test_run_when_votes_are_exchanged_in_every_third_update_only_then_still_stops_and_saves(
    options: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(tmp_path / "counts", "--stop_at", 2, *options, "--output_dir", folder, VOTES_EVERY="3")
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 3)
    # A save that follows from the number of the update needs no vote.
    outcome = run(tmp_path / "counts", *options, "--output_dir", folder, "--resume_from_checkpoint", VOTES_EVERY="3")
    assert outcome.returncode == 0, outcome.stderr
    assert {"step_3", "step_4", "step_8", "step_12"} <= {path.name for path in (folder / "checkpoints").iterdir()}


@pytest.mark.slow
def test_synchronous_run_when_one_rank_is_asked_to_stop_between_micro_batches_then_both_abandon_the_update(
    options: list[str], tmp_path: Path
) -> None:
    words = [*options, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"]
    assert run(tmp_path / "c", *words, "--output_dir", tmp_path / "whole", UPDATER="synchronous").returncode == 0
    folder = tmp_path / "cut"
    # Between the first and the second micro-batch of some update: the other rank is asked nothing.
    run(tmp_path / "c", "--stop_at", 9, *words, "--output_dir", folder, UPDATER="synchronous")
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "stopped"
    outcome = run(tmp_path / "c", *words, "--output_dir", folder, "--resume_from_checkpoint", UPDATER="synchronous")
    assert outcome.returncode == 0, outcome.stderr
    assert losses(folder) == losses(tmp_path / "whole")
