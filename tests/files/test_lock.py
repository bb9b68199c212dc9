"""Two runs never write into one folder, and a run that was killed does not block the next one."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.config.errors import UserError
from llm.files.lock import LockLostError, lock_holder, locked, release_all

ROOT = str(Path(__file__).parents[2])


def hold(path: Path, *, pid: int, host: str | None = None, job: str | None = None) -> None:
    """Write a lock file as the process `pid` of `host` does."""
    path.write_text(json.dumps({"host": host or socket.gethostname(), "pid": pid, "job": job}))


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A function that returns the errors that were logged so far."""
    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def dead_pid() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_locked_when_the_block_runs_then_the_file_names_the_holder_and_is_removed_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with locked(path):
        holder = json.loads(path.read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
    assert not path.exists()


def test_locked_when_the_disk_is_full_then_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, _: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"), locked(tmp_path / "run.lock"):
        pytest.fail("held without a lock")
    assert list(tmp_path.iterdir()) == []


def test_release_when_another_run_took_the_lock_over_then_its_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with locked(path):
        hold(path, pid=1)
    assert json.loads(path.read_text())["pid"] == 1
    assert os.listdir(tmp_path) == ["run.lock"]


def test_locked_when_the_block_fails_then_the_file_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "run.lock"):
        raise ZeroDivisionError
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("pid", [os.getppid(), 1], ids=["the parent", "init"])
def test_locked_when_the_holder_is_alive_then_raises_and_keeps_the_file(tmp_path: Path, pid: int) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=pid)
    with pytest.raises(UserError, match=f"process {pid} on .*choose another --output_dir") as refusal, locked(path):
        pytest.fail("two holders")
    assert "\n" not in str(refusal.value)
    assert json.loads(path.read_text())["pid"] == pid


def test_locked_when_held_on_another_host_then_raises_and_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=dead_pid(), host="another-host")
    with pytest.raises(UserError, match=f"on another-host.*remove {path}"), locked(path):
        pytest.fail("two holders")


def test_locked_when_the_holder_has_ended_then_takes_the_lock_over(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=dead_pid())
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


@pytest.mark.parametrize("content", ["", '{"host": "her', "[]", '{"host": "here"}', '{"host": "here", "pid": null}'])
def test_locked_when_the_file_is_half_written_then_takes_the_lock_over(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.lock"
    path.write_text(content)
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_locked_when_this_process_holds_the_lock_then_raises(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with locked(path):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), locked(path):
            pytest.fail("two holders")
        assert path.exists()


def test_locked_when_untouched_for_a_minute_then_takes_the_lock_over_from_any_host(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=1, host="another-host")
    os.utime(path, (0, 0))
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_locked_when_another_container_left_this_process_number_then_takes_the_lock_over(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=os.getpid())  # left by a killed container with the same process numbers
    with locked(path):
        assert "id" in json.loads(path.read_text())


def test_lock_holder_when_called_then_is_the_process_that_is_alive(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    assert lock_holder(path) is None
    with locked(path):
        assert lock_holder(path) == (socket.gethostname(), os.getpid())
    hold(path, pid=os.getppid())
    assert lock_holder(path) == (socket.gethostname(), os.getppid())
    os.utime(path, (0, 0))
    assert lock_holder(path) is None
    hold(path, pid=dead_pid())
    assert lock_holder(path) is None
    assert path.exists()  # only a start removes it


def test_locked_when_held_by_the_same_job_on_another_host_then_takes_the_lock_over(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=1, host="another-host", job="slurm 7")
    for job in (None, "slurm 8"):
        with pytest.raises(UserError, match="on another-host, job slurm 7"), locked(path, job=job):
            pytest.fail("two holders")
    with locked(path, job="slurm 7"):
        assert json.loads(path.read_text())["job"] == "slurm 7"


def test_locked_when_the_holder_is_alive_on_this_host_then_raises_for_the_same_job_too(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=os.getppid(), job="slurm 7")
    with pytest.raises(UserError), locked(path, job="slurm 7", wait_for_stale=True):
        pytest.fail("two holders")


def test_locked_when_the_holder_on_another_host_is_dead_then_wait_for_stale_waits_and_takes_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=1, host="another-host")
    touched = time.time() - 58
    os.utime(path, (touched, touched))
    with pytest.raises(UserError), locked(path):
        pytest.fail("waited without wait_for_stale")
    started = time.monotonic()
    with caplog.at_level(logging.INFO, "llm"), locked(path, wait_for_stale=True):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert 1 <= time.monotonic() - started < 10
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for the lock of process 1 on another-host, last touched 58 s ago"
    ]


def test_locked_when_the_holder_on_another_host_is_alive_then_wait_for_stale_raises_soon(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    hold(path, pid=1, host="another-host")
    os.utime(path, (time.time() - 9, time.time() - 9))
    heartbeat = threading.Timer(1.5, lambda: os.utime(path))
    heartbeat.start()
    with pytest.raises(UserError, match="another-host"), locked(path, wait_for_stale=True):
        pytest.fail("two holders")
    heartbeat.join()
    assert [file.name for file in tmp_path.iterdir()] == ["run.lock"]


@pytest.mark.parametrize("by", ["another run", "a user"])
def test_check_when_the_lock_was_lost_then_raises_and_leaves_the_file(
    tmp_path: Path, lines: Callable[[], list[str]], by: str
) -> None:
    path = tmp_path / "run.lock"
    with locked(path) as lock:
        assert lock.is_held() and lock.touch()
        lock.check()
        path.unlink()
        if by == "another run":
            hold(path, pid=17, host="another-host")
            os.utime(path, (1000, 1000))
        assert not lock.is_lost  # the file was not read yet
        with pytest.raises(LockLostError) as loss:
            lock.check()
        assert not lock.touch() and not lock.is_held() and lock.is_lost
    cause = "is held by another run now (process 17 on another-host)" if by == "another run" else "was removed"
    assert str(loss.value).startswith(f"the lock {path} {cause}:")
    assert lines() == [str(loss.value)]
    assert path.exists() == (by == "another run")
    assert not path.exists() or (path.stat().st_mtime == 1000 and json.loads(path.read_text())["pid"] == 17)


def test_heartbeat_when_the_lock_was_lost_then_reports_it_and_stops_touching(
    tmp_path: Path, lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.files.lock._HEARTBEAT_SECONDS", 0.05)
    path = tmp_path / "run.lock"
    with locked(path) as lock:
        os.utime(path, (0, 0))
        time.sleep(0.5)
        assert time.time() - path.stat().st_mtime < 30
        hold(path, pid=1, host="another-host")
        os.utime(path, (0, 0))
        time.sleep(0.5)
        assert lock.is_lost
        assert path.stat().st_mtime == 0
    assert len(lines()) == 1
    assert path.exists()


@pytest.mark.parametrize("is_lost", [False, True])
def test_locked_when_the_block_fails_after_a_loss_then_raises_the_loss(tmp_path: Path, is_lost: bool) -> None:
    path = tmp_path / "run.lock"

    def work() -> None:
        with locked(path):
            if is_lost:
                hold(path, pid=1, host="another-host")
            (tmp_path / "removed by the other").unlink()

    with pytest.raises(LockLostError if is_lost else FileNotFoundError):
        work()
    assert path.exists() == is_lost


def test_release_all_when_called_then_removes_the_locks_of_this_process_alone(tmp_path: Path) -> None:
    with locked(tmp_path / "a.lock"), locked(tmp_path / "b.lock"):
        hold(tmp_path / "b.lock", pid=1, host="another-host")
        release_all()
        assert [file.name for file in tmp_path.iterdir()] == ["b.lock"]


def test_locked_when_the_holder_is_suspended_for_a_minute_then_another_process_takes_and_keeps_the_lock(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.lock"
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom llm.files import lock\nlock._HEARTBEAT_SECONDS = 0.1\n"
        "with lock.locked(Path(sys.argv[1])) as held:\n"
        "    print('held', flush=True)\n    while not held.is_lost: time.sleep(0.05)\n"
        "print('lost', flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOT}) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        other.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        os.utime(path, (0, 0))  # as after a minute
        with locked(path) as lock:
            other.send_signal(signal.SIGCONT)
            assert other.stdout.readline() == "lost\n"
            assert other.wait(20) == 0
            assert lock.is_held()
    assert list(tmp_path.iterdir()) == []
