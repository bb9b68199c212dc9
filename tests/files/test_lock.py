"""Two runs never write into one folder, and a dead one is in nobody's way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llm.config.errors import UserError
from llm.files.lock import locked


def hold(path: Path, *, pid: int, host: str | None = None) -> None:
    """Writes a lock as the process `pid` of `host` would have."""
    path.write_text(json.dumps({"host": host or socket.gethostname(), "pid": pid}))


def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_lock_when_held_then_names_its_holder_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with locked(path):
        holder = json.loads(path.read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
    assert not path.exists()


def test_lock_when_the_block_fails_then_is_released(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "run.lock"):
        raise ZeroDivisionError
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("pid", [os.getppid(), 1], ids=["the parent", "init"])
def test_lock_when_its_holder_lives_then_is_refused_and_kept(tmp_path: Path, pid: int) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=pid)
    with pytest.raises(UserError, match=f"process {pid} on .*choose another --output_dir") as refusal, locked(path):
        pytest.fail("two holders")
    assert "\n" not in str(refusal.value)
    assert json.loads(path.read_text())["pid"] == pid


def test_lock_when_held_on_another_host_then_is_refused_and_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=dead_pid(), host="another-host")
    with pytest.raises(UserError, match=f"on another-host.*remove {path}"), locked(path):
        pytest.fail("two holders")


def test_lock_when_its_process_is_gone_then_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=dead_pid())
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


@pytest.mark.parametrize("content", ["", '{"host": "her', "[]", '{"host": "here"}', '{"host": "here", "pid": null}'])
def test_lock_when_half_written_then_is_taken_over(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.lock"
    path.write_text(content)
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_lock_when_held_by_this_process_then_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with locked(path):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), locked(path):
            pytest.fail("two holders")
        assert path.exists()


def test_lock_when_untouched_for_a_minute_then_is_taken_over_from_any_host(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=1, host="another-host")
    os.utime(path, (0, 0))
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_lock_when_its_number_is_ours_but_not_its_process_then_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=os.getpid())  # as a killed container with the same numbers left it
    with locked(path):
        assert "id" in json.loads(path.read_text())
