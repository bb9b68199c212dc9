"""One command on all hosts: how it is started, ended, and how signals reach it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

import llm.clusters.multi_host
from llm.clusters.allocation import JobAllocation
from llm.clusters.multi_host import run_on_all_hosts
from llm.config.errors import UserError


def test_program_when_it_ignores_sigterm_then_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = tmp_path / "deaf"
    deaf.write_text(f"#!/bin/sh\ntrap '' TERM\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    deaf.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(deaf))
    monkeypatch.setattr(llm.clusters.multi_host, "_TERMINATE_GRACE_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(UserError, match="deaf did not end within 2 s"):
        run_on_all_hosts(JobAllocation(("a",)), [], os.environ, limit_seconds=2)
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def stand_in(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("end", "code"), [("exit 0", 0), ("exit 75", 75), ("kill -KILL $$", 137)])
def test_command_when_it_ends_then_its_code_or_signal_is_returned(
    end: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(stand_in(tmp_path / "python", f'echo "$@" > {tmp_path}/words; {end}')))
    assert run_on_all_hosts(JobAllocation(("a",)), ["--nproc", "2"], os.environ) == code
    assert (tmp_path / "words").read_text() == "-m llm.launch node --nproc 2\n"


def test_command_when_in_a_container_then_names_the_job_and_runs_python_inside(tmp_path: Path) -> None:
    stand_in(tmp_path / "apptainer", f'echo "$@" > {tmp_path}/words')
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    allocation = JobAllocation(("n1",), job="7")
    assert run_on_all_hosts(allocation, [], environment, command="doctor", container="apptainer exec 'my x.sif'") == 0
    assert (tmp_path / "words").read_text() == "exec my x.sif python -m llm.launch doctor --hosts n1 --job 7\n"


def test_signal_when_this_process_gets_one_then_the_command_gets_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"trap 'echo saved > {tmp_path}/saved; exit 75' TERM", "while :; do kill -TERM $PPID; sleep 0.2; done"]
    monkeypatch.setattr(sys, "executable", str(stand_in(tmp_path / "python", "\n".join(lines))))
    # The command may signal this process before it listens.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        inner = signal.getsignal(signal.SIGTERM)
        assert run_on_all_hosts(JobAllocation(("a",)), [], os.environ, limit_seconds=30) == 75
        assert (tmp_path / "saved").read_text() == "saved\n"
        assert signal.getsignal(signal.SIGTERM) is inner
    finally:
        signal.signal(signal.SIGTERM, before)
