"""``python -m llm.plot``, from the command line to the picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm.plot import main, metrics_by_name
from tests.metrics_file import write_metrics


def test_plot_when_given_runs_then_writes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_metrics(tmp_path / name / "metrics.jsonl")
    picture = tmp_path / "curves.png"
    runs = [str(tmp_path / "a"), str(tmp_path / "b" / "metrics.jsonl")]
    assert main([*runs, "--output", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    assert capsys.readouterr().out == f"{picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*runs, "--output", str(tmp_path / "curves.PDF")]) == 0
    assert (tmp_path / "curves.PDF").read_bytes().startswith(b"%PDF")


def test_plot_when_there_is_no_run_then_one_line_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--output", str(tmp_path / "c.png")]) == 1
    line = f"error: {tmp_path}: no metrics.jsonl there; give a run's --output_dir\n"
    assert capsys.readouterr().err == line


def test_plot_when_options_are_wrong_then_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs/a", "--output", "curves.jpg"]) == 2
    assert capsys.readouterr().err == "error: --output curves.jpg: must end in .png, .pdf or .svg\n"
    assert main(["runs/a", "--smoothing", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: --smoothing x: must be a whole number")
    assert main([]) == 2
    assert "--runs" in capsys.readouterr().err


def test_metrics_by_name_when_folders_have_the_same_name_then_uses_their_paths(tmp_path: Path) -> None:
    paths = [write_metrics(tmp_path / p / "metrics.jsonl") for p in ("x/run", "y/run", "y/other")]
    metrics = metrics_by_name([str(path.parent) for path in paths])
    assert list(metrics) == [str(tmp_path / "x/run"), str(tmp_path / "y/run"), "other"]
    assert list(metrics.values()) == paths
