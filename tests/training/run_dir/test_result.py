"""Test the paths that the result of a run gives."""

from __future__ import annotations

from pathlib import Path

from llm.training.run_dir.result import TrainResult


def test_model_dir_when_stopped_then_is_the_newest_checkpoint(tmp_path: Path) -> None:
    for name in ("step_2", "step_10", ".step_12.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    result = TrainResult(exit_code=75, output_dir=tmp_path, step=10)
    assert result.stopped
    assert result.checkpoints == [tmp_path / "checkpoints" / "step_2", tmp_path / "checkpoints" / "step_10"]
    assert result.model_dir == tmp_path / "checkpoints" / "step_10"


def test_model_dir_when_finished_then_is_the_folder_of_the_run(tmp_path: Path) -> None:
    assert TrainResult(exit_code=0, output_dir=tmp_path).model_dir == tmp_path


def test_model_dir_when_stopped_before_the_first_checkpoint_then_is_none(tmp_path: Path) -> None:
    assert TrainResult(exit_code=75, output_dir=tmp_path).model_dir is None
    assert TrainResult(exit_code=75).model_dir is None
