"""Programs that make updates on request, each in a process of its own, so that they can be measured in turn.

The measured program runs its own loop and calls its `Gate` after every update; the gate lets it go on when the
measuring process asks for more. So start-up, caches and memory are each program's own, and rounds cost none of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_LINES_OF_AN_ERROR = 15


class Gate:
    """Stands behind every update of a program. Made before the program says a word: its own output goes to stderr.

    The first answer is given after the first update, unasked.

    Attributes:
        facts: what the first answer says beside that update.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left = 1
        self._wall = self._cpu = 0.0
        self.start_clock()

    def passed(self, loss: Any, also: Callable[[], Mapping[str, Any]] = dict) -> None:
        """One update was made; returns when the next one is wanted.

        Args:
            loss: of the update, a number or a tensor; it is read for an answer only.
            also: what an answer says beside it; not on the clock.

        Raises:
            SystemExit: no more are wanted.
        """
        self._left -= 1
        if self._left == 0:
            self.stop_clock()
            self.answer(loss=float(loss), **also())

    def start_clock(self) -> None:
        """Goes on measuring."""
        self._began = time.perf_counter(), time.process_time()

    def stop_clock(self) -> None:
        """What follows is not measured; the device has done all that it was given."""
        _wait_for_device()
        self._wall += time.perf_counter() - self._began[0]
        self._cpu += time.process_time() - self._began[1]

    def pause(self, work: Callable[[], object]) -> None:
        """Does something that is not on the clock."""
        self.stop_clock()
        work()
        self.start_clock()

    def answer(self, **found: Any) -> None:
        """Answers with the clock stopped, waits for the next request, and starts the clock anew.

        Raises:
            SystemExit: there is none.
        """
        clocks = {"wall_seconds": self._wall, "cpu_seconds": self._cpu}
        self._answers.write(json.dumps({**self.facts, **clocks, **found}) + "\n")
        self._answers.flush()
        request = sys.stdin.readline()
        if not request:
            raise SystemExit(0)
        self.facts = {}
        self._left = int(request)
        self._wall = self._cpu = 0.0
        self.start_clock()


class Program:
    """A process whose program stands at a gate.

    Args:
        words: module and arguments.
        environment: on top of this process's own.
        python: the interpreter.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], python: str = sys.executable) -> None:
        self._words = words
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - until it is closed
        self._process = subprocess.Popen(
            [python, "-m", *words],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        self.first = self._answer()

    def ask(self, num_updates: int) -> dict[str, Any]:
        """Lets it make so many updates; what it answers, with the seconds of all of them.

        Raises:
            SystemExit: it failed; its last words are in the message.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{num_updates}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: there will be no answer
        return self._answer()

    def close(self) -> None:
        """Lets it end, and waits until it has."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._said.seek(0)
        last = "".join(self._said.readlines()[-_LINES_OF_AN_ERROR:])
        sys.exit(f"{' '.join(self._words[:2])} ended with code {code}:\n{last}")


def thread_environment(threads: int, device: str) -> dict[str, str]:
    """So many threads for every library, no accelerator where the device is the CPU, and no Hub."""
    threaded = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**threaded, **hidden, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _wait_for_device() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available():
        torch.accelerator.synchronize()
