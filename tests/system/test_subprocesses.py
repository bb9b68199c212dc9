"""Subprocesses: the task arrives, signals and ends are as documented."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from llm.system.subprocesses import Process

ROOT = Path(__file__).parents[2]


def describe(pipe: Connection, *arguments: object) -> None:
    """Send back what the subprocess knows of itself, then wait for the pipe to close."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    pipe.send((arguments, os.getpid(), os.getsid(0), signal.SIGINT in blocked, signal.SIGUSR1 in blocked))
    with pytest.raises(EOFError):
        pipe.recv()


def sleep(pipe: Connection, seconds: float) -> None:
    time.sleep(seconds)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_process_when_started_then_gets_its_arguments_and_blocks_the_signals_of_a_terminal() -> None:
    process = Process(describe, 7, {"a": [1.5]})
    arguments, pid, session, blocks_int, blocks_usr1 = process.pipe.recv()
    assert arguments == (7, {"a": [1.5]})
    assert pid == session == process.pid != os.getpid()
    assert blocks_int and blocks_usr1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])  # of this process
    assert process.exit_code is None
    process.close_pipe()
    assert process.wait(30) == 0 == process.exit_code


def test_process_when_terminated_then_its_exit_code_is_minus_the_signal() -> None:
    process = Process(sleep, 60.0)
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM


def test_wait_when_the_work_takes_longer_then_kills_it() -> None:
    process = Process(sleep, 60.0)
    started = time.monotonic()
    assert process.wait(0.2) == -signal.SIGKILL
    assert time.monotonic() - started < 20


def test_process_when_the_interpreter_is_unknown_then_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(OSError, match="interpreter"):
        Process(sleep, 0.0)


def test_process_when_it_cannot_be_started_then_no_pipe_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", fail)
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    with pytest.raises(OSError, match="unavailable"):
        Process(sleep, 0.0)
    after = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    assert len(after) == len(before)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
