"""Programs that run training steps on request, each in its own process, so that they can be measured in turn.

A measured program runs its own loop and calls its `Gate` after every step. The gate blocks until the measuring process
requests more steps. Each program keeps its own caches and memory, and starts only once for all rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_NUM_ERROR_LINES = 15


class Gate:
    """Measures the steps of a program and reports them to the measuring process.

    Create the gate before the program prints anything: it redirects the output of the program to stderr. It sends the
    first report after the first step, without a request.

    Attributes:
        facts: values that the next report contains besides those of its steps.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._reports = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._num_requested = 1
        self._reset_clock()
        self.start_clock()

    def after_update(self, loss: Any, extra: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Count a step; after the last requested one, send a report and wait for the next request.

        Args:
            loss: loss of the step, a number or a scalar tensor; read only for a report.
            extra: returns further values of the report; its time is not measured.

        Raises:
            SystemExit: there are no more requests.
        """
        self._num_requested -= 1
        if self._num_requested == 0:
            self.stop_clock()
            self.report({"loss": float(loss), **extra()})

    def start_clock(self) -> None:
        """Start or continue the measurement of time."""
        self._wall_start = time.perf_counter()
        self._cpu_start = time.process_time()

    def stop_clock(self) -> None:
        """Wait until the device is idle, then stop the measurement of time."""
        _wait_for_device()
        self._wall_seconds += time.perf_counter() - self._wall_start
        self._cpu_seconds += time.process_time() - self._cpu_start

    def pause(self, work: Callable[[], object]) -> None:
        """Do some work whose time is not measured."""
        self.stop_clock()
        work()
        self.start_clock()

    def report(self, values: Mapping[str, Any]) -> None:
        """Send a report, wait for the next request, then reset and start the clock.

        Call `stop_clock` before, so that the report has the time of the last steps.

        Raises:
            SystemExit: there are no more requests.
        """
        clocks = {"wall_seconds": self._wall_seconds, "cpu_seconds": self._cpu_seconds}
        self._reports.write(json.dumps({**self.facts, **clocks, **values}) + "\n")
        self._reports.flush()
        request = sys.stdin.readline()
        if not request:
            raise SystemExit(0)
        self.facts = {}
        self._num_requested = int(request)
        self._reset_clock()
        self.start_clock()

    def _reset_clock(self) -> None:
        self._wall_seconds = 0.0
        self._cpu_seconds = 0.0


class Program:
    """A process that runs a program with a gate.

    Args:
        command: name of the module and its arguments.
        environment: environment variables, added to those of this process.
        python: path of the Python interpreter.
        checkout: the folder whose code is run; None for this one.

    Attributes:
        first_report: the report of the first step.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        python: str = sys.executable,
        checkout: Path | None = None,
    ) -> None:
        self._command = command
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [python, "-m", *command],
            env={**os.environ, **environment, **({} if checkout is None else {"PYTHONPATH": str(checkout)})},
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            text=True,
        )
        self.first_report = self._read_report()

    def run_updates(self, num_updates: int) -> dict[str, Any]:
        """Let the program run steps; return its report, with the seconds of all of them together.

        Raises:
            SystemExit: the program failed; the message has the last lines of its output.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{num_updates}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the program ended, so there is no report
        return self._read_report()

    def close(self) -> None:
        """Let the program end, and wait for its end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._output.close()

    def _read_report(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            report: dict[str, Any] = json.loads(line)
            return report
        code = self._process.wait()
        self._output.seek(0)
        last_lines = "".join(self._output.readlines()[-_NUM_ERROR_LINES:])
        sys.exit(f"{' '.join(self._command[:2])} ended with code {code}:\n{last_lines}")


def thread_environment(threads: int, device: str) -> dict[str, str]:
    """Return environment variables: threads of every library, no accelerator if the device is `cpu`, and no Hub."""
    thread_counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**thread_counts, **hidden, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _wait_for_device() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available():
        torch.accelerator.synchronize()
