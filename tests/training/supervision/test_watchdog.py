"""An update that hangs ends the run with its stacks; other long waits are only logged."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm.training.supervision.watchdog import Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A watchdog with a clock that only the test advances."""

    def __init__(self, *, grace_seconds: float = 0.0) -> None:
        self.clock = Clock()
        self.reports: list[str] = []
        self.ends: list[str] = []
        self.watchdog = Watchdog(self.reports.append, self.ends.append, grace_seconds=grace_seconds, clock=self.clock)

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.now += 1
            self.watchdog.check()

    def updates(self, *durations: float) -> None:
        for seconds in durations:
            with self.watchdog.during_update():
                self.clock.now += seconds


def test_update_when_it_hangs_then_ends_after_five_minutes() -> None:
    watched = Watched()
    watched.updates(1, 1)
    watched.watchdog.check()
    with watched.watchdog.during_update():
        watched.wait(300)
        assert watched.ends == []
        watched.wait(2)
    assert "no update finished for 301 s (the limit is 300 s)" in watched.ends[0]
    assert watched.reports == watched.ends[:1]


def test_update_when_updates_are_slow_then_may_take_twenty_times_the_median() -> None:
    watched = Watched()
    watched.updates(30, 40, 1000)
    assert watched.watchdog.limit_seconds == 800


def test_update_when_it_is_the_first_then_may_compile_for_half_an_hour() -> None:
    watched = Watched()
    with watched.watchdog.during_update():
        watched.wait(1800)
        assert watched.ends == []
        watched.wait(2)
    assert len(watched.reports) == 1


def test_update_when_there_is_a_grace_time_then_the_end_comes_that_much_after_the_report() -> None:
    watched = Watched(grace_seconds=10)
    watched.updates(1)
    watched.watchdog.check()
    with watched.watchdog.during_update():
        watched.wait(305)
        assert len(watched.reports) == 1
        assert watched.ends == []
        watched.wait(7)
    assert len(watched.reports) == 1
    assert watched.ends


def test_update_when_the_process_was_suspended_then_is_not_hung() -> None:
    watched = Watched()
    watched.updates(1)
    with watched.watchdog.during_update():
        watched.wait(100)
        watched.clock.now += 86_400
        watched.wait(100)
    assert watched.reports == []


def test_phase_when_it_takes_long_then_a_line_a_minute_names_it_and_the_run_continues(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watched = Watched()
    watched.watchdog.last_log_time = -1000.0
    with caplog.at_level(logging.INFO, "llm"), watched.watchdog.phase("the evaluation"):
        watched.wait(3600)
    assert watched.ends == []
    assert len(caplog.records) == 60
    assert caplog.records[1].getMessage() == "waiting for the evaluation (2 min)"


def test_phase_when_the_run_logs_lines_then_the_watchdog_logs_none(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    with caplog.at_level(logging.INFO, "llm"), watched.watchdog.phase("the text"):
        for _ in range(20):
            watched.wait(30)
            watched.watchdog.last_log_time = watched.clock.now
    assert caplog.records == []


def test_phase_when_it_ends_then_the_outer_phase_continues() -> None:
    watched = Watched()
    watched.updates(1)
    with watched.watchdog.phase("outer"):
        with pytest.raises(ZeroDivisionError), watched.watchdog.during_update():
            raise ZeroDivisionError
        watched.wait(1000)
    assert watched.reports == []


@pytest.mark.slow
def test_run_when_an_update_hangs_then_exits_with_stacks_and_the_status_names_it(
    tiny_options: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    program = """
import sys, time
import llm.training.supervision.watchdog as watchdog
from llm.training.updaters.synchronous import SynchronousUpdater
from llm.trainers.gpt import main
watchdog._MIN_LIMIT_SECONDS = 2.0
watchdog._CHECK_SECONDS = 0.2
update = SynchronousUpdater.update
def hanging(self, batches, step, **more):
    if step == 3:
        time.sleep(1000)
    return update(self, batches, step, **more)
SynchronousUpdater.update = hanging
sys.exit(main(sys.argv[1:]))
"""
    started = time.monotonic()
    command = [sys.executable, "-c", program, *tiny_options, "--output_dir", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert time.monotonic() - started < 60
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "no update finished for" in status["reason"]
    for text in (result.stderr, (folder / "log.txt").read_text()):
        assert "the stacks of all threads" in text
        assert "in hanging" in text
