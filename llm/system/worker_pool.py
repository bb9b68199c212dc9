"""Processes that call functions for this one."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import TypeVar

from llm.config.errors import UserError
from llm.system.subprocesses import Process

Made = TypeVar("Made")

_SECONDS_TO_END = 10.0


def num_usable_cpus() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class WorkerPool:
    """Processes that call functions for this one; they end with the block, or when this process does.

    They import what the functions need and nothing else, which takes a fifth of a second for the engine
    of `llm.tokenization.tiktoken_encoder`.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self, num_workers: int) -> None:
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._shared: tuple[int, object] = (0, None)
        # One thread waits for each process.
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="worker")
        try:
            for _ in range(num_workers):
                self._workers.append(_Worker())
        except OSError:
            self.close()
            raise
        for worker in self._workers:
            self._free.put(worker)

    def share(self, value: object) -> None:
        """From now on the first argument of every call; goes once to each process."""
        self._shared = (self._shared[0] + 1, value)

    def submit(self, function: Callable[..., Made], *arguments: object) -> Future[Made]:
        """Has the next free process call `function(shared, *arguments)`.

        The result raises what the function raises, and UserError if the process was killed.

        Args:
            function: one that can be imported by its name.
            arguments: anything that can be pickled.
        """
        return self._threads.submit(self._call, self._shared, function, arguments)

    def _call(self, shared: tuple[int, object], function: Callable[..., Made], arguments: tuple[object, ...]) -> Made:
        worker = self._free.get()
        try:
            made: Made = worker.call(shared, function, arguments)
            return made
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """Ends the processes and waits for them; what has not begun is not done."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close_pipe()
        for worker in self._workers:
            worker.wait()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


class _Worker:
    """One process, and which value it was given to share."""

    def __init__(self) -> None:
        self._process = Process(serve)
        self._shared = 0

    def call(self, shared: tuple[int, object], function: Callable[..., Made], arguments: tuple[object, ...]) -> Made:
        number, value = shared
        try:
            if number != self._shared:
                self._process.pipe.send((None, value))
                self._shared = number
            self._process.pipe.send((function, arguments))
            answer: tuple[Made, BaseException | None] = self._process.pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        made, error = answer
        if error is not None:
            raise error
        return made

    def _death(self) -> UserError:
        code = self._process.wait(0.0)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return UserError(
            f"a process that tokenizes was killed ({how}); if memory ran out, give --preprocessing_num_workers 1;"
            " start the same command again"
        )

    def close_pipe(self) -> None:
        self._process.close_pipe()

    def wait(self) -> None:
        self._process.wait(_SECONDS_TO_END)


def serve(pipe: Connection) -> None:
    """What a worker does: calls functions until the other end of its pipe closes."""
    shared: object = None
    try:
        while True:
            function, arguments = pipe.recv()
            if function is None:
                shared = arguments
                continue
            pipe.send_bytes(_answer(function, shared, arguments))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # Nobody is left to tell, and nothing to put away.


def _answer(function: Callable[..., object], shared: object, arguments: tuple[object, ...]) -> memoryview:
    """What came of a call, and the error if nothing did, pickled."""
    try:
        return ForkingPickler.dumps((function(shared, *arguments), None))
    except BaseException as error:  # an engine that panics raises no Exception
        try:
            ForkingPickler.loads(data := ForkingPickler.dumps((None, error)))
        except Exception:
            return ForkingPickler.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
        return data
