"""Tests of runs that are resumed with another number of processes: the updates are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import keep_only
from tests.trainers.test_gpt import Train, records, torchrun


def _copy_killed(folder: Path, step: int, target: Path) -> None:
    """Copy a run to `target` as a kill after step `step` would leave it: one checkpoint and no finished model."""
    shutil.copytree(folder, target)
    keep_only(target, step)
    (target / "model.safetensors").unlink()


@pytest.mark.slow
def test_run_when_resumed_on_two_ranks_and_then_on_one_then_the_losses_are_those_of_one_rank(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--max_train_steps", "100", "--checkpointing_steps", "30", "--logging_steps", "1"]
    assert train(*words, "--output_dir", tmp_path / "one").code == 0
    _copy_killed(tmp_path / "one", 30, tmp_path / "two")
    resumed = [*words, "--resume_from_checkpoint", "--per_device_train_batch_size", "2"]
    outcome = torchrun(*resumed, "--output_dir", tmp_path / "two")
    assert outcome.returncode == 0, outcome.stderr
    assert "resumed from step 30" in outcome.stdout
    assert "updates: 100 of 8 blocks" in outcome.stdout
    _copy_killed(tmp_path / "two", 60, tmp_path / "again")
    last = train(*words, "--resume_from_checkpoint", "--output_dir", tmp_path / "again")
    assert last.code == 0, last.err
    assert "resumed from step 60" in last.out
    losses = [[record["loss"] for record in records(tmp_path / name) if "loss" in record] for name in ("one", "again")]
    assert len(losses[0]) == len(losses[1]) == 100
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    tokens = [json.loads((tmp_path / name / "all_results.json").read_text())["tokens"] for name in ("one", "again")]
    assert tokens[0] == tokens[1] == 100 * 8 * 32


@pytest.mark.slow
def test_resume_when_the_global_batch_is_not_divisible_then_is_refused_with_the_sizes_that_work(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--max_train_steps", "2", "--output_dir", tmp_path / "run"]
    assert train(*words).code == 0
    outcome = train(*words, "--max_train_steps", "4", "--per_device_train_batch_size", "3", "--resume_from_checkpoint")
    assert outcome.code == 1
    assert "--global_batch_size 8" in outcome.err
    assert "1, 2, 4, 8" in outcome.err
