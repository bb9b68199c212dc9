"""A pool of subprocesses that call functions for this process."""

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

Result = TypeVar("Result")

_EXIT_GRACE_SECONDS = 10.0


def num_usable_cpus() -> int:
    """Return the number of CPUs (hardware threads) that this process may use, by its affinity."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class WorkerPool:
    """A context manager of subprocesses that call functions; they end with the block, or when this process ends.

    The subprocesses import only what the functions need. For `llm.tokenization.tiktoken_encoder` that takes a fifth of
    a second.

    Raises:
        OSError: a subprocess cannot be started.
    """

    def __init__(self, num_workers: int) -> None:
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._shared: tuple[int, object] = (0, None)  # version and value
        # One thread waits for the answers of each subprocess.
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="worker")
        try:
            for _ in range(num_workers):
                self._workers.append(_Worker())
        except OSError:
            self.close()
            raise
        for worker in self._workers:
            self._idle.put(worker)

    def share(self, value: object) -> None:
        """Set the first argument of every later call, None until then.

        The value must be picklable; each subprocess receives it once, with its next call.
        """
        self._shared = (self._shared[0] + 1, value)

    def submit(self, function: Callable[..., Result], *arguments: object) -> Future[Result]:
        """Let the next idle subprocess call `function(shared, *arguments)`, and return a future of the result.

        The future raises what the function raises, or UserError if the subprocess was killed.

        Args:
            function: a function that can be imported by its name.
            arguments: picklable values.
        """
        return self._threads.submit(self._call, self._shared, function, arguments)

    def _call(
        self, shared: tuple[int, object], function: Callable[..., Result], arguments: tuple[object, ...]
    ) -> Result:
        worker = self._idle.get()
        try:
            return worker.call(shared, function, arguments)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Cancel the calls that have not begun, wait for the others, and end the subprocesses."""
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
    """One subprocess, and the version of the shared value that it has received."""

    def __init__(self) -> None:
        self._process = Process(serve)
        self._shared_version = 0

    def call(
        self, shared: tuple[int, object], function: Callable[..., Result], arguments: tuple[object, ...]
    ) -> Result:
        version, value = shared
        try:
            if version != self._shared_version:
                self._process.pipe.send((None, value))
                self._shared_version = version
            self._process.pipe.send((function, arguments))
            answer: tuple[Result, BaseException | None] = self._process.pipe.recv()
        except (EOFError, OSError):
            raise self._killed_error() from None
        result, error = answer
        if error is not None:
            raise error
        return result

    def _killed_error(self) -> UserError:
        code = self._process.wait(0.0)
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        return UserError(
            f"a process that tokenizes was killed ({cause}); if memory ran out, give --preprocessing_num_workers 1;"
            " start the same command again"
        )

    def close_pipe(self) -> None:
        self._process.close_pipe()

    def wait(self) -> None:
        self._process.wait(_EXIT_GRACE_SECONDS)


def serve(pipe: Connection) -> None:
    """Answer calls until the other end of the pipe closes; the work of a pool's subprocess.

    Args:
        pipe: receives `(function, arguments)`, or `(None, value)` for a new shared value; sends `(result, error)`.
    """
    shared: object = None
    try:
        while True:
            function, arguments = pipe.recv()
            if function is None:
                shared = arguments
                continue
            pipe.send_bytes(_pickled_answer(function, shared, arguments))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent has ended; there is nothing to report or to clean up


def _pickled_answer(function: Callable[..., object], shared: object, arguments: tuple[object, ...]) -> memoryview:
    """Call the function and return its pickled answer: `(result, None)` or `(None, error)`."""
    try:
        return ForkingPickler.dumps((function(shared, *arguments), None))
    except BaseException as error:  # a panic of the Rust engine is no Exception
        try:
            data = ForkingPickler.dumps((None, error))
            ForkingPickler.loads(data)  # some errors can be pickled but not restored
        except Exception:
            return ForkingPickler.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
        return data
