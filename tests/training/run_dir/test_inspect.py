"""Summaries of folders that were written by hand; `tests/test_runs.py` reads those of real runs."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from llm.files.manifest import write_manifest
from llm.training.run_dir.inspect import is_run, read_run, resume_command, status_line

NO_PROCESS = 2**22 + 1  # larger than any process id


def save(
    run: Path, step: int, *, eval_loss: float | None = None, train_loss: float | None = None, **state: Any
) -> Path:
    """Write a checkpoint with a manifest, but without weights."""
    folder = run / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    progress = {"step": step, "train_loss": train_loss, "eval_loss": eval_loss, "eval_step": step}
    content = {"step": step, "reasons": ["regular"], "progress": progress, "plan": {"num_steps": 10}, **state}
    (folder / "training_state.json").write_text(json.dumps(content))
    write_manifest(folder)
    return folder


@pytest.mark.parametrize("sign", ["status.json", "metrics.jsonl", "checkpoints"])
def test_is_run_when_a_start_has_written_then_is_true(tmp_path: Path, sign: str) -> None:
    assert not is_run(tmp_path)
    (tmp_path / "config.toml").touch()  # a user may have written it
    assert not is_run(tmp_path)
    (tmp_path / sign).touch()
    assert is_run(tmp_path)


def test_read_run_when_the_folder_is_empty_then_so_is_the_summary(tmp_path: Path) -> None:
    run = read_run(tmp_path, verify=True)
    assert (run.status, run.holder, run.last_step, run.checkpoints, run.num_abandoned) == ({}, None, None, [], 0)
    assert (run.best, run.num_steps, run.num_nodes, run.num_processes) == (None, None, 1, 1)
    assert run.unmanaged_paths == []
    assert "no status.json can be read" in status_line(run)
    assert resume_command(run) is None


def test_checkpoints_when_one_is_damaged_then_it_is_neither_good_nor_best(tmp_path: Path) -> None:
    save(tmp_path, 2, eval_loss=3.0, train_loss=3.5)
    save(tmp_path, 4, eval_loss=2.0)
    save(tmp_path, 6, eval_loss=1.0)
    (tmp_path / "checkpoints" / "step_6" / "training_state.json").unlink()
    run = read_run(tmp_path, verify=False)
    assert [checkpoint.step for checkpoint in run.checkpoints] == [2, 4, 6]
    assert [checkpoint.step for checkpoint in run.good] == [2, 4]
    assert run.best is not None and run.best.step == 4
    assert run.checkpoints[0].train_loss == 3.5 and run.checkpoints[0].reasons == ["regular"]
    assert run.checkpoints[2].problem is not None
    assert (run.checkpoints[2].train_loss, run.checkpoints[2].eval_loss, run.checkpoints[2].reasons) == (None, None, [])
    assert run.num_steps == 10


def test_best_when_two_losses_are_equal_then_is_the_later_checkpoint(tmp_path: Path) -> None:
    for step in (2, 4):
        save(tmp_path, step, eval_loss=2.0)
    save(tmp_path, 6)  # not evaluated
    best = read_run(tmp_path, verify=False).best
    assert best is not None and best.step == 4


def test_last_step_when_the_last_line_is_cut_then_is_that_of_the_line_before(tmp_path: Path) -> None:
    long = json.dumps({"step": 7, "samples": ["x" * 100_000]})
    for content, last_step in (
        ('{"step": 1}\n{"step": 2}\n', 2),
        ('{"step": 1}\n{"step": 2, "lo', 1),
        (f'{{"step": 1}}\n{long}\n{{"step": 8}}\n', 8),
        ("", None),
        ("no record\n", None),
    ):
        (tmp_path / "metrics.jsonl").write_text(content)
        assert read_run(tmp_path, verify=False).last_step == last_step


@pytest.mark.parametrize(
    ("status", "pid", "expected"),
    [
        ({"state": "running"}, "parent", "running, process {pid} on {host} after step 5"),
        ({"state": "running"}, NO_PROCESS, "killed after step 5: status.json says running"),
        ({"state": "done", "step": 10, "exit_code": 0}, None, "done after step 10 (exit code 0)"),
        ({"state": "failed", "reason": "a\nb"}, None, "failed after step 5: a b (exit code ?)"),
        ({"state": "failed", "reason": "a"}, "parent", "starting, process {pid} on {host}; before that failed after"),
    ],
)
def test_status_line_when_written_then_is_this(
    tmp_path: Path, status: dict[str, Any], pid: int | str | None, expected: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n')
    (tmp_path / "status.json").write_text(json.dumps(status))
    pid = os.getppid() if pid == "parent" else pid
    if pid is not None:
        (tmp_path / "run.lock").write_text(json.dumps({"host": socket.gethostname(), "pid": pid}))
    line = status_line(read_run(tmp_path, verify=False))
    assert line.startswith(expected.format(pid=pid, host=socket.gethostname()))


def test_resume_command_when_the_run_had_two_nodes_then_starts_torchrun_with_a_rendezvous(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'[output]\noutput_dir = "{tmp_path}"\n')
    save(tmp_path, 2, world={"num_processes": 8, "num_nodes": 2})
    run = read_run(tmp_path, verify=False)
    assert (run.num_nodes, run.num_processes) == (2, 4)
    assert resume_command(run) == (
        "torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint FIRST_NODE:29400 --nproc_per_node 4 "
        f"-m llm.trainers.gpt --config {tmp_path}/config.toml --resume_from_checkpoint"
    )


def test_resume_command_when_the_path_is_relative_then_changes_to_the_folder_of_the_start(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    path.mkdir(parents=True)
    (path / "config.toml").write_text('[output]\noutput_dir = "runs/a"\n')
    assert resume_command(read_run(path, verify=False)) == (
        f"cd {tmp_path} && python -m llm.trainers.gpt --config runs/a/config.toml --resume_from_checkpoint"
    )
