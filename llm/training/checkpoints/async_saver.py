"""Asynchronous checkpoints: the training waits for a copy in memory, never for a disk.

Rank 0 alone writes, in a thread: hashing, writing and fsync release the interpreter lock. The thread calls no
collective.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llm.config.errors import UserError
from llm.config.options import OutputOptions
from llm.training.checkpoints.store import NotFiniteError, remove, superseded

log = logging.getLogger(__name__)

# Timed saves become rarer where they would cost more than this share of the time.
_LARGEST_SHARE = 0.02
_CHECK_SECONDS = 2.0


class Write(Protocol):
    """A function that writes a checkpoint of copied tensors."""

    def __call__(self, *, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Write these tensors (any shape and dtype, on the CPU), and return when they are durable."""


class HostBuffers:
    """Copies of tensors in host memory, which is reused: allocating new pages costs more than copying."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copy tensors of any shape and dtype as they are now; the copies are valid until the next call.

        Args:
            tensors: names and tensors on any device; a tensor needs to exist only until the next one is asked for.

        Returns:
            Contiguous copies on the CPU, of the same shapes and dtypes.
        """
        copies: dict[str, Tensor] = {}
        devices = set()
        for name, tensor in tensors:
            # A copy on the tensor's own stream: memory that is freed afterwards is not reused before it.
            copies[name] = self._buffer(name, tensor).copy_(tensor.detach(), non_blocking=tensor.device.type == "cuda")
            if tensor.device.type == "cuda":
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Pinned, because a copy from the device would otherwise go through a second buffer, and block.
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._buffers[name] = buffer
        return buffer


class AsyncSaver:
    """Copies checkpoints to host memory and writes them in a thread. Made on rank 0 of a run with a folder.

    Attributes:
        step: the update of the newest save, finished or not; None before the first.
        stall_seconds: seconds that the training waited for each save so far.
        skipped_because: why the newest save was left out although the run continues; None when it was not.
    """

    def __init__(self, options: OutputOptions, *, request_file: Path, checkpoints: Path) -> None:
        """Nothing is written yet.

        Args:
            options: how often timed saves are due, and how many checkpoints are kept.
            request_file: while this file exists, it requests a checkpoint; a save that answers it removes it.
            checkpoints: the folder that holds the checkpoints.
        """
        self.step: int | None = None
        self.stall_seconds: list[float] = []
        self.skipped_because: NotFiniteError | None = None
        self._request_file = request_file
        self._checkpoints = checkpoints
        self._limit = options.save_total_limit
        self._interval_seconds = 60 * options.save_minutes
        self._saved_at = time.monotonic()
        self._checked_at = self._saved_at
        self._weight_buffers = HostBuffers()
        self._tensor_buffers = HostBuffers()
        self._thread: threading.Thread | None = None
        self._failure: UserError | None = None

    def requests(self) -> list[str]:
        """Return why a checkpoint is requested now: `timed` (the clock), `asked` (the file), both or neither."""
        reasons = []
        now = time.monotonic()
        if self._interval_seconds and now - self._saved_at >= self._interval_seconds:
            reasons.append("timed")
        if now - self._checked_at >= _CHECK_SECONDS:
            self._checked_at = now
            if self._request_file.exists():
                reasons.append("asked")
        return reasons

    def check(self) -> None:
        """Raise the failure of an earlier save, without waiting.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        if self._failure is not None:
            raise self._failure

    def save(
        self,
        step: int,
        weights: Iterable[tuple[str, Tensor]],
        tensors: Mapping[str, Tensor],
        write: Write,
        reasons: list[str],
        *,
        gathering_seconds: float = 0.0,
    ) -> None:
        """Copy the tensors and start to write them; `saved step N` is logged when they are durable.

        Waits for the checkpoint before this one.

        Args:
            step: finished updates.
            weights: names and weights, any shape and dtype.
            tensors: the updater's tensors by name, any shape and dtype.
            write: writes a checkpoint of the copies; called in the thread.
            reasons: why it is saved.
            gathering_seconds: for which the training has already waited until the tensors were available.

        Raises:
            UserError: the checkpoint before could not be written.
        """
        started = time.monotonic() - gathering_seconds
        self.wait()
        weight_copies = self._weight_buffers.copy(weights)
        tensor_copies = self._tensor_buffers.copy(tensors.items())
        self.step = step
        self.skipped_because = None
        self._saved_at = time.monotonic()
        stalled = self._saved_at - started
        self.stall_seconds.append(stalled)
        self._thread = threading.Thread(
            target=self._write,
            args=(step, partial(write, weights=weight_copies, tensors=tensor_copies), reasons, stalled),
            name="save",
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Wait for the thread without raising its failure: something else ends the run."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, step: int, write: Callable[[], None], reasons: list[str], stalled: float) -> None:
        started = time.thread_time()
        try:
            write()
            log.info("saved step %d", step)
            self._remove_superseded(reasons)
        except NotFiniteError as error:
            self.skipped_because = error
            log.warning("%s", error)
        except UserError as error:
            self._failure = error
        except BaseException as error:  # of any kind: the training must end
            self._failure = UserError(f"checkpoint of step {step} was not written ({type(error).__name__}: {error})")
        self._lengthen_interval(stalled + (time.thread_time() - started) / (os.cpu_count() or 1))

    def _remove_superseded(self, reasons: list[str]) -> None:
        """Remove an answered request and superseded checkpoints; a failure to do so costs disk space, not the run."""
        try:
            if "asked" in reasons:
                self._request_file.unlink(missing_ok=True)
            for path in superseded(self._checkpoints, self._limit):
                remove(path)
        except OSError as error:
            log.warning("%s cannot be removed (%s)", error.filename or "an older checkpoint", error.strerror or error)

    def _lengthen_interval(self, cost_seconds: float) -> None:
        """Make timed saves so rare that they cost no more than their share of the time."""
        if self._interval_seconds and cost_seconds > _LARGEST_SHARE * self._interval_seconds:
            self._interval_seconds = cost_seconds / _LARGEST_SHARE
            log.info("saving takes %.1f s: from now on every %.1f minutes", cost_seconds, self._interval_seconds / 60)
