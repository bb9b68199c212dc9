"""Subprocesses answer calls, and end however the process that started them ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm.config.errors import UserError
from llm.system.worker_pool import WorkerPool, num_usable_cpus

ROOT = Path(__file__).parents[2]


def _pid(shared: object) -> int:
    return os.getpid()


def _wait_until_ended(pids: list[int]) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if not [pid for pid in pids if _is_alive(pid)]:
            return
        time.sleep(0.02)
    pytest.fail("a process still runs")


def _is_alive(pid: int) -> bool:
    result = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE, text=True, check=False)
    return bool(result.stdout.strip()) and not result.stdout.startswith("Z")


def test_worker_pool_when_called_then_other_processes_answer_and_end_with_the_block() -> None:
    with WorkerPool(2) as workers:
        pids = [worker._process.pid for worker in workers._workers]
        answers = [workers.submit(divmod, number) for number in (1, 7)]
        with pytest.raises(TypeError):
            answers[0].result()
        workers.share(17)
        assert [workers.submit(divmod, number).result() for number in range(1, 9)] == [
            divmod(17, number) for number in range(1, 9)
        ]
    _wait_until_ended(pids)


def test_worker_pool_when_a_function_fails_then_raises_its_error() -> None:
    with WorkerPool(1) as workers:
        workers.share("x")
        with pytest.raises(ValueError, match=r"invalid literal for int\(\) with base 10: 'x'"):
            workers.submit(int).result()
        # The process still works.
        assert workers.submit(str.upper).result() == "X"


def test_worker_pool_when_a_process_is_killed_then_raises_one_clear_error() -> None:
    with WorkerPool(2) as workers:
        workers.share(30.0)
        answers = [workers.submit(time.sleep) for _ in range(2)]
        time.sleep(0.5)
        for worker in workers._workers:
            os.kill(worker._process.pid, signal.SIGKILL)
        for answer in answers:
            with pytest.raises(UserError, match=r"a process that tokenizes was killed \(signal 9\)"):
                answer.result(timeout=20)


# The script has no `__main__` guard: workers must not import it.
SCRIPT = """
import signal, sys, time
from llm.system.worker_pool import WorkerPool
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
workers = WorkerPool(2)
workers.share(3.0 if "busy" in sys.argv else 0.0)
for _ in range(2):
    sleep = workers.submit(time.sleep)
print(*(worker._process.pid for worker in workers._workers), flush=True)
if "ask" in sys.argv:
    sleep.result()
    print("answered", *sorted({name for name in ("torch", "transformers") if name in sys.modules}), flush=True)
    workers.close()
else:
    time.sleep(60)
"""


def _start(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, path, *words], env=environment, stdout=subprocess.PIPE, text=True)


def test_worker_pool_when_started_from_a_script_without_guard_then_the_script_runs_once(tmp_path: Path) -> None:
    process = _start(tmp_path, "ask")
    printed, _ = process.communicate(timeout=60)
    lines = printed.splitlines()
    assert len(lines) == 2 and lines[1] == "answered"


@pytest.mark.parametrize(
    ("how", "state"),
    [(signal.SIGKILL, "idle"), (signal.SIGKILL, "busy"), (signal.SIGINT, "idle"), (signal.SIGTERM, "idle")],
)
def test_worker_pool_when_its_parent_is_killed_then_the_workers_end(
    tmp_path: Path, how: signal.Signals, state: str
) -> None:
    process = _start(tmp_path, state)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    process.send_signal(how)
    process.wait(timeout=120)
    _wait_until_ended(pids)


def test_num_usable_cpus_when_called_then_is_at_least_one() -> None:
    assert num_usable_cpus() >= 1
