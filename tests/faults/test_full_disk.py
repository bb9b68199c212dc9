"""A real disk that fills up under a run: one line, nothing half written, and the run goes on when there is room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome
from tests.faults.campaign import differences
from tests.faults.full_disk import run_on_small_disk

Train = Callable[..., Outcome]

# Not a byte, and a part of a checkpoint.
ROOMS = {"none": 0, "half": 150 << 10}


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_run_when_its_disk_fills_up_then_ends_in_one_line_and_goes_on_bit_identical(
    room: str, train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--dropout", "0.1", "--checkpointing_steps", "5", "--eval_steps", "4"]
    words += ["--logging_steps", "1", "--sample_steps", "10"]
    assert train(*words, "--output_dir", tmp_path / "whole").code == 0
    ended = run_on_small_disk(words, tmp_path, room_bytes=ROOMS[room])
    assert ended.code == 1
    lines = [line for line in ended.err.splitlines() if "log.txt cannot be written" not in line]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    assert "No space left on device" in lines[0]
    assert "make room" in lines[0]
    assert ended.status["state"] == "failed"
    assert "No space left on device" in str(ended.status["reason"])
    assert {"checkpoints/step_4", "checkpoints/step_5"} & set(ended.files)
    assert [name for name in ended.files if Path(name).name.startswith(".")] == []
    assert "run.lock" not in ended.files
    assert ended.problems == []
    assert (ended.code_while_full, ended.err_while_full.count("\n")) == (1, 1), ended.err_while_full
    assert ended.code_after == 0
    assert differences(tmp_path / "whole", tmp_path / "run") == []


@pytest.mark.slow
def test_run_when_its_disk_fills_up_between_saves_then_the_records_end_it_in_one_line(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--max_train_steps", "100", "--checkpointing_steps", "50", "--eval_steps", "100"]
    words += ["--logging_steps", "1"]
    assert train(*words, "--output_dir", tmp_path / "whole").code == 0
    ended = run_on_small_disk(words, tmp_path, room_bytes=0)
    assert ended.code == 1
    lines = [line for line in ended.err.splitlines() if "log.txt cannot be written" not in line]
    assert len(lines) == 1, ended.err
    assert "the records of step" in lines[0]
    assert ended.problems == []
    assert ended.code_after == 0
    assert differences(tmp_path / "whole", tmp_path / "run") == []
