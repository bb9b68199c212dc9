"""Names of a checkpoint's files, and the facts in its small ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llm.training.checkpoints.layout import (
    eval_loss,
    external_optimizer,
    is_external,
    read_state,
    reasons_and_loss,
    saved_steps,
    unmanaged_paths,
)


def write_state(path: Path, **changes: Any) -> Path:
    """Make a checkpoint's folder with nothing but its training state."""
    path.mkdir(parents=True)
    state = {"step": 4, "reasons": ["timed"], "progress": {"eval_loss": 1.5, "eval_step": 4}}
    (path / "training_state.json").write_text(json.dumps(state | changes))
    return path


def test_steps_when_listed_then_are_in_the_order_of_numbers_without_temporary_ones(tmp_path: Path) -> None:
    for name in ("step_10", "step_9", "step_100", ".step_11.42.tmp", "step_", "step_9b", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_12").touch()
    assert saved_steps(tmp_path) == [(step, tmp_path / f"step_{step}") for step in (9, 10, 100)]
    assert saved_steps(tmp_path / "none") == []


def test_state_when_it_is_not_a_json_object_then_raises(tmp_path: Path) -> None:
    path = write_state(tmp_path / "step_4")
    assert read_state(path)["reasons"] == ["timed"]
    for content, message in (("[1]", "not a JSON object"), ("{", "line 1")):
        (path / "training_state.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_state(path)
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("loss", "step", "expected"),
    [(1.5, 4, 1.5), (1.5, 3, math.inf), (None, None, math.inf), (math.nan, 4, math.inf), (math.inf, 4, math.inf)],
)
def test_eval_loss_when_other_weights_were_evaluated_or_it_is_not_finite_then_is_inf(
    loss: float | None, step: int | None, expected: float
) -> None:
    assert eval_loss({"step": 4, "progress": {"eval_loss": loss, "eval_step": step}}) == expected


def test_reasons_when_the_state_is_damaged_or_missing_then_there_are_none(tmp_path: Path) -> None:
    assert reasons_and_loss(write_state(tmp_path / "step_4")) == (frozenset({"timed"}), 1.5)
    assert reasons_and_loss(write_state(tmp_path / "step_5", progress=None)) is None
    assert reasons_and_loss(tmp_path / "step_6") is None


def test_unmanaged_paths_when_listed_then_are_all_but_own_abandoned_and_hidden_ones(tmp_path: Path) -> None:
    write_state(tmp_path / "step_4")
    (tmp_path / "notes.txt").touch()
    for name in ("step_5", "epoch_0", "abandoned", ".step_9.gone"):
        (tmp_path / name).mkdir()
    assert [path.name for path in unmanaged_paths(tmp_path)] == ["epoch_0", "notes.txt", "step_5"]
    assert unmanaged_paths(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("step_3", "model.safetensors", True),
        ("epoch_0", "model.safetensors", True),
        ("checkpoint-500", "model.safetensors", True),
        ("checkpoint_500", "model.safetensors", False),
        ("best", "model.safetensors", False),
        ("step_3", "manifest.json", False),
        ("step_3", "training_state.json", False),
        ("step_3", "optimizer.safetensors", False),
    ],
)
def test_external_when_the_folder_has_a_known_name_and_no_file_of_this_package_then_is_external(
    name: str, file: str, expected: bool, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / file).touch()
    assert is_external(tmp_path / name) is expected
    assert not is_external(tmp_path / "step_4")  # it does not exist


@pytest.mark.parametrize("name", ["optimizer.bin", "optimizer.pt"])
def test_external_optimizer_when_there_is_a_file_then_is_its_path(name: str, tmp_path: Path) -> None:
    assert external_optimizer(tmp_path) is None
    (tmp_path / name).touch()
    assert external_optimizer(tmp_path) == tmp_path / name
