"""Logging of a run: which ranks log to which stream, the log file, and the threads whose errors are ignored."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm.distributed.world import LOGGER_NAME
from llm.training.run_dir import console
from llm.training.run_dir.console import ProgressBar, add_log_file, setup_logging, teardown_logging

LOG = logging.getLogger("llm")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Close the handlers after each test."""
    yield
    teardown_logging()


def test_logging_when_this_is_rank_0_then_lines_go_to_stdout_and_warnings_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup_logging(is_main=True, rank=0)
    LOG.debug("hidden")
    LOG.info("step 1")
    logging.getLogger("llm.training.run").info("step 2")
    LOG.warning("careful")
    out, err = capsys.readouterr()
    assert (out, err) == ("step 1\nstep 2\n", "careful\n")


def test_logging_when_this_is_another_rank_then_only_its_waiting_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(is_main=False, rank=3)
    LOG.info("options")
    logging.getLogger(LOGGER_NAME).info("waiting for rank 0")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "[rank 3] waiting for rank 0\n")


def test_logging_when_set_up_again_then_each_line_is_written_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        setup_logging(is_main=True, rank=0)
    LOG.info("once")
    assert capsys.readouterr().out == "once\n"
    teardown_logging()
    assert LOG.handlers == []
    assert LOG.propagate


def test_console_when_its_encoding_lacks_a_character_then_the_character_is_escaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    setup_logging(is_main=True, rank=0)
    LOG.info("a \u2013 b")
    assert written.getvalue() == b"a \\u2013 b\n"


def test_console_when_its_stream_is_closed_then_nothing_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    setup_logging(is_main=True, rank=0)
    monkeypatch.setattr(sys, "stdout", None)
    LOG.info("lost")
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    LOG.info("lost too")


def test_log_file_when_added_then_lines_are_appended_with_their_time(tmp_path: Path) -> None:
    setup_logging(is_main=True, rank=0)
    file = tmp_path / "log.txt"
    file.write_text("an earlier start\n")
    add_log_file(file)
    LOG.info("step 1")
    teardown_logging()
    first, second = file.read_text().splitlines()
    assert first == "an earlier start"
    assert second[:4].isdigit() and second.endswith(" step 1")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_log_file_when_its_disk_is_full_then_one_line_reports_it_and_the_run_continues(
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup_logging(is_main=True, rank=0)
    add_log_file(Path("/dev/full"))
    for number in range(3):
        LOG.info("line %d", number)
    teardown_logging()
    out, err = capsys.readouterr()
    assert out == "line 0\nline 1\nline 2\n"
    assert err.count("/dev/full") == err.count("\n") == 1 and "No space left on device" in err


@pytest.mark.parametrize(("module", "is_reported"), [("tensorboard.summary.writer", False), ("llm.data", True)])
def test_thread_when_it_fails_then_is_reported_unless_it_is_tensorboards(module: str, is_reported: bool) -> None:
    failures: list[Any] = []
    hook = console._ignoring_tensorboard(failures.append)
    kind = type("WriterThread", (threading.Thread,), {"__module__": module})
    failure: Any = SimpleNamespace(thread=kind())
    hook(failure)
    assert failures == ([failure] if is_reported else [])


def test_progress_bar_when_there_is_no_terminal_then_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(3, 10, is_main=True) as bar:
        bar.advance()
        assert bar.bar.disable
    assert capsys.readouterr().out == ""


def test_progress_bar_when_on_a_terminal_then_counts_updates_on_rank_0_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    with ProgressBar(3, 10, is_main=True) as bar:
        bar.advance()
        assert (bar.bar.n, bar.bar.total) == (4, 10)
    with ProgressBar(3, 10, is_main=False) as other:
        assert other.bar.disable
