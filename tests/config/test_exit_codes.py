"""Exit codes of commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm.config.errors import UsageError, UserError
from llm.config.exit_codes import run_command


@pytest.mark.parametrize(("error", "code"), [(UserError("one\ntwo"), 1), (UsageError("one\ntwo"), 2)])
def test_run_command_when_a_user_error_then_prints_lines_and_returns_its_code(
    error: UserError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        raise error

    assert run_command(command) == code
    assert capsys.readouterr().err == "error: one\nerror: two\n"


def test_run_command_when_interrupted_then_is_130_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise KeyboardInterrupt

    assert run_command(command) == 130
    assert capsys.readouterr() == ("", "")


def test_run_command_when_it_succeeds_then_returns_the_code_of_the_command() -> None:
    assert run_command(lambda: 75) == 75


def test_run_command_when_it_is_a_bug_then_keeps_the_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_run_command_when_the_output_pipe_is_closed_then_prints_nothing() -> None:
    script = (
        "import sys; from llm.config.exit_codes import run_command\n"
        "sys.exit(run_command(lambda: print('x' * 10**6) or 7))"
    )
    shell = f'"{sys.executable}" -c "{script}" | true'
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_run_command_when_a_disk_is_full_then_prints_one_line_and_other_errors_keep_their_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command() -> int:
        return os.write(os.open("/dev/full", os.O_WRONLY), b"x")

    assert run_command(command) == 1
    assert capsys.readouterr().err == "error: a file cannot be written (No space left on device); make room\n"
    with pytest.raises(FileNotFoundError):
        run_command(lambda: os.stat("/nowhere").st_size)


def test_run_command_when_out_of_memory_then_prints_one_line_and_other_errors_keep_their_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import numpy as np
    import torch

    def accelerators() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    for command in (lambda: len(torch.empty(2**50)), lambda: len(np.zeros(2**55)), accelerators):
        assert run_command(command) == 1
        message = capsys.readouterr().err
        assert message.startswith("error: out of memory (") and message.count("\n") == 1
        assert "--per_device_train_batch_size" in message
    with pytest.raises(RuntimeError, match=r"size mismatch|shapes"):
        run_command(lambda: len(torch.zeros(2, 3) @ torch.zeros(2, 3)))
