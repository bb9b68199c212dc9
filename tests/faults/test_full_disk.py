"""Tests with a real disk that fills up during a run: one error line, no partial file, and the run can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome
from tests.faults.campaign import differences
from tests.faults.full_disk import run_on_small_disk

Train = Callable[..., Outcome]

# Bytes that are left on the disk: none, and room for a part of a checkpoint.
ROOM_BYTES = {"none": 0, "half": 150 << 10}


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOM_BYTES)
def test_run_when_its_disk_fills_up_then_fails_in_one_line_and_resumes_bit_identical(
    room: str, train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--dropout", "0.1", "--checkpointing_steps", "5", "--eval_steps", "4"]
    words += ["--logging_steps", "1", "--sample_steps", "10"]
    assert train(*words, "--output_dir", tmp_path / "uninterrupted").code == 0
    result = run_on_small_disk(words, tmp_path, room_bytes=ROOM_BYTES[room])
    assert result.code == 1
    lines = [line for line in result.err.splitlines() if "log.txt cannot be written" not in line]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    assert "No space left on device" in lines[0]
    assert "make room" in lines[0]
    assert result.status["state"] == "failed"
    assert "No space left on device" in str(result.status["reason"])
    assert {"checkpoints/step_4", "checkpoints/step_5"} & set(result.files)
    assert [name for name in result.files if Path(name).name.startswith(".")] == []
    assert "run.lock" not in result.files
    assert result.problems == []
    assert (result.code_while_full, result.err_while_full.count("\n")) == (1, 1), result.err_while_full
    assert result.code_after == 0
    assert differences(tmp_path / "uninterrupted", tmp_path / "run") == []


@pytest.mark.slow
def test_run_when_its_disk_fills_up_between_saves_then_fails_in_one_line_when_it_writes_records(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--max_train_steps", "100", "--checkpointing_steps", "50", "--eval_steps", "100"]
    words += ["--logging_steps", "1"]
    assert train(*words, "--output_dir", tmp_path / "uninterrupted").code == 0
    result = run_on_small_disk(words, tmp_path, room_bytes=0)
    assert result.code == 1
    lines = [line for line in result.err.splitlines() if "log.txt cannot be written" not in line]
    assert len(lines) == 1, result.err
    assert "the records of step" in lines[0]
    assert result.problems == []
    assert result.code_after == 0
    assert differences(tmp_path / "uninterrupted", tmp_path / "run") == []
