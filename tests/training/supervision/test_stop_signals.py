"""The first signal, or the deadline, requests a stop; the second signal ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from llm.config.errors import Stopped
from llm.training.supervision.deadline import Deadline
from llm.training.supervision.stop_signals import SIGNALS, catch_stop_signals


@pytest.fixture(autouse=True)
def caught() -> Iterator[list[int]]:
    """Install handlers that only record signals, so that none ends the test; give the recorded signals."""
    numbers: list[int] = []

    def catch(number: int, _: FrameType | None) -> None:
        numbers.append(number)

    previous = {number: signal.signal(number, catch) for number in SIGNALS}
    yield numbers
    for number, handler in previous.items():
        signal.signal(number, handler)


def run(program: str, *, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a program after the imports that all these programs need."""
    head = (
        "import os, signal, sys, threading, time\n"
        "from llm.training.supervision.stop_signals import catch_stop_signals\n"
        "from llm.training.supervision.deadline import Deadline\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + program], capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_when_it_is_the_first_then_its_name_is_recorded(number: int, caught: list[int]) -> None:
    with catch_stop_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.reason == signal.Signals(number).name
    assert caught == []


def test_signal_when_a_launcher_repeats_it_immediately_then_counts_as_the_same_request(caught: list[int]) -> None:
    with catch_stop_signals() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        assert stop.reason == "SIGTERM"
    assert caught == []


def test_signal_when_it_is_the_second_then_ends_a_process_whose_main_thread_hangs() -> None:
    # A C mutex that is locked twice: while the main thread hangs in C code, Python runs no signal handlers.
    result = run(
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "mutex = ctypes.create_string_buffer(128)\n"
        "libc.pthread_mutex_lock(mutex)\n"
        "def send():\n"
        "    time.sleep(0.5); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(2.5); os.kill(os.getpid(), signal.SIGINT)\n"
        "with catch_stop_signals() as stop:\n"
        "    threading.Thread(target=send, daemon=True).start()\n"
        "    libc.pthread_mutex_lock(mutex)\n"
    )
    assert result.returncode == 128 + signal.SIGINT, result.stderr
    assert result.stderr == "a second signal (SIGINT): ended at once\n"


def test_signal_when_it_is_the_second_then_on_forced_exit_gets_reason_and_code_and_may_hang() -> None:
    result = run(
        "def on_forced_exit(reason, code):\n"
        "    print(reason, code, flush=True)\n"
        "    time.sleep(60)\n"
        "with catch_stop_signals(on_forced_exit=on_forced_exit):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(2.2)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(30)\n",
        timeout=20,
    )
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert result.stdout == "a second signal (SIGTERM): ended at once 143\n"


def test_handlers_when_the_block_ends_or_fails_then_the_previous_ones_are_restored(caught: list[int]) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    threads = threading.active_count()
    with catch_stop_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(ZeroDivisionError), catch_stop_signals():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert threading.active_count() == threads
    os.kill(os.getpid(), signal.SIGUSR1)
    assert caught == [signal.SIGUSR1]


def test_interruptible_when_a_signal_arrives_then_stopped_is_raised_once() -> None:
    with catch_stop_signals() as stop:
        cleaned_up: list[bool] = []

        def work() -> None:
            try:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(10)
            finally:
                os.kill(os.getpid(), signal.SIGUSR1)  # the launcher repeats the signal during the clean-up
                time.sleep(0.1)
                cleaned_up.append(True)

        with pytest.raises(Stopped, match="SIGUSR1"), stop.interruptible():
            work()
        assert cleaned_up
        with pytest.raises(Stopped), stop.interruptible():
            pytest.fail("the block began after the stop was requested")
        os.kill(os.getpid(), signal.SIGTERM)  # outside of the block a signal is only recorded
        assert stop.reason == "SIGUSR1"


def test_deadline_when_it_passes_then_is_a_reason_like_a_signal() -> None:
    with catch_stop_signals(Deadline(max_time=time.time() + 0.3)) as stop:
        assert not stop()
        time.sleep(0.4)
        assert stop()
        assert stop.reason == "max_time"


def test_deadline_when_the_main_thread_is_busy_then_interrupts_it_and_does_not_count_as_a_signal() -> None:
    result = run(
        "from llm.config.errors import Stopped\n"
        "with catch_stop_signals(Deadline(max_time=time.time() + 0.5)) as stop:\n"
        "    began = time.monotonic()\n"
        "    try:\n"
        "        with stop.interruptible():\n"
        "            time.sleep(30)\n"
        "    except Stopped as stopped:\n"
        "        print(stopped, time.monotonic() - began < 5)\n"
        "    time.sleep(2.5)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.5)\n"
        "    print(stop.reason)\n"
    )
    assert result.stdout == "max_time True\nmax_time\n", result.stderr
    assert result.returncode == 0


def test_catch_stop_signals_when_not_in_the_main_thread_then_only_the_deadline_applies() -> None:
    results: list[object] = []

    def work() -> None:
        with catch_stop_signals(Deadline(max_time=0)) as stop:
            results.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [True]


def test_signal_when_a_forked_process_gets_it_then_its_parent_is_not_stopped() -> None:
    with catch_stop_signals() as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(0.2)
        assert not stop()
