"""A run goes on with another number of processes: the same updates, whoever computes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.trainers.test_gpt import Train, records, torchrun


def _only(folder: Path, step: int, target: Path) -> None:
    """What a kill after update `step` leaves of a run."""
    shutil.copytree(folder, target, ignore=lambda _, names: [n for n in names if n.startswith("model")])
    for path in (target / "checkpoints").iterdir():
        if path.name != f"step_{step}":
            shutil.rmtree(path)
    shutil.rmtree(target / "checkpoints" / f"step_{step}")
    shutil.copytree(folder / "checkpoints" / f"step_{step}", target / "checkpoints" / f"step_{step}")


@pytest.mark.slow
def test_run_when_resumed_on_two_ranks_and_then_on_one_then_the_losses_are_those_of_one(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--max_train_steps", "100", "--checkpointing_steps", "30", "--logging_steps", "1"]
    assert train(*words, "--output_dir", tmp_path / "one").code == 0
    _only(tmp_path / "one", 30, tmp_path / "two")
    resumed = [*words, "--resume_from_checkpoint", "--per_device_train_batch_size", "2"]
    outcome = torchrun(*resumed, "--output_dir", tmp_path / "two")
    assert outcome.returncode == 0, outcome.stderr
    assert "resumed from step 30" in outcome.stdout
    assert "updates: 100 of 8 blocks" in outcome.stdout
    _only(tmp_path / "two", 60, tmp_path / "again")
    last = train(*words, "--resume_from_checkpoint", "--output_dir", tmp_path / "again")
    assert last.code == 0, last.err
    assert "resumed from step 60" in last.out
    losses = [[record["loss"] for record in records(tmp_path / name) if "loss" in record] for name in ("one", "again")]
    assert len(losses[0]) == len(losses[1]) == 100
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    tokens = [json.loads((tmp_path / name / "all_results.json").read_text())["tokens"] for name in ("one", "again")]
    assert tokens[0] == tokens[1] == 100 * 8 * 32


@pytest.mark.slow
def test_run_when_its_batch_does_not_divide_among_the_ranks_then_is_refused_with_the_sizes_that_work(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--max_train_steps", "2", "--output_dir", tmp_path / "run"]
    assert train(*words).code == 0
    outcome = train(*words, "--max_train_steps", "4", "--per_device_train_batch_size", "3", "--resume_from_checkpoint")
    assert outcome.code == 1
    assert "--global_batch_size 8 does not divide by 3" in outcome.err
    assert "may be 1, 2, 4, 8" in outcome.err
