"""Checkpoints behind the training: it stops for a copy in memory, never for a disk.

One process writes, rank 0, and in a thread: hashing, writing and fsync let go of the interpreter. No
collective is ever called there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llm.config.errors import UserError
from llm.config.options import OutputOptions
from llm.training.checkpoints.store import NotFiniteError, remove, superseded
from llm.training.triggers import Trigger

log = logging.getLogger(__name__)

# Saving costs no more than that share of the time: timed saves become rarer where it would.
_LARGEST_SHARE = 0.02
_LOOK_SECONDS = 2.0


class Write(Protocol):
    """Writes a checkpoint of these tensors."""

    def __call__(self, *, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Returns when it is durable."""


class HostBuffers:
    """A copy of tensors on the CPU, filled anew each time: taking new pages costs more than copying."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, contiguous, on the CPU; valid until the next call.

        Names of one tensor (tied weights) are names of one copy.
        """
        found: dict[str, Tensor] = {}
        copies: dict[tuple[Any, ...], Tensor] = {}
        devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
        for name, tensor in tensors.items():
            key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if key not in copies or not tensor.numel():
                copies[key] = self._place(name, tensor).copy_(tensor.detach(), non_blocking=True)
            found[name] = copies[key]
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return found

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            # Pinned, or a copy from the device would be made through a second buffer, and waited for.
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._kept[name] = kept
        return kept


class AsyncSaver:
    """When checkpoints are due, and the thread that writes them. Made on rank 0 of a run with a folder.

    Attributes:
        step: the update of the newest save, finished or not; None before the first.
        stalls: seconds that the training waited for each save so far.
        refusal: why the newest save was left out although the run goes on; None when it was not.
    """

    def __init__(
        self, options: OutputOptions, folder: Path, checkpoints: Path, *, regular: Trigger, last: Trigger
    ) -> None:
        """Nothing is written yet.

        Args:
            options: how often, and how many are kept.
            folder: the run's, where a file called SAVE asks for a checkpoint.
            checkpoints: where they go.
            regular: when `--checkpointing_steps` says so.
            last: the last update.
        """
        self._ask = folder / "SAVE"
        self._checkpoints, self._limit = checkpoints, options.save_total_limit
        self._due = {"regular": regular, "end": last}
        self._interval = 60 * options.save_minutes
        self._is_stretched = False
        self._saved_at = self._looked_at = time.monotonic()
        self._memory = HostBuffers()
        self._thread: threading.Thread | None = None
        self._failure: UserError | None = None
        self.refusal: NotFiniteError | None = None
        self.step: int | None = None
        self.stalls: list[float] = []

    def reasons(self, step: int) -> list[str]:
        """Why a checkpoint is due after this update; none when it is not."""
        found = [name for name, due in self._due.items() if due(step)]
        now = time.monotonic()
        if self._interval and now - self._saved_at >= self._interval:
            found.append("timed")
        if now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            if self._ask.exists():
                found.append("asked")
        return found

    def check(self) -> None:
        """Looks back, without waiting.

        Raises:
            UserError: the last one could not be written.
        """
        if self._failure is not None:
            raise self._failure

    def save(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        write: Write,
        reasons: list[str],
        *,
        gathering_seconds: float = 0.0,
    ) -> None:
        """Copies the tensors and has them written; `saved step N` is said when they are durable.

        Waits for the checkpoint before this one.

        Args:
            step: finished updates.
            weights: the model's, by name.
            tensors: the optimizer's, by name.
            write: writes a checkpoint of the copies; called in the thread.
            reasons: those of `reasons`, or others.
            gathering_seconds: that the training stood still for until the tensors were at hand.

        Raises:
            UserError: the former one could not be written.
        """
        started = time.monotonic() - gathering_seconds
        self.wait()
        joined = {**{f"w/{name}": t for name, t in weights.items()}, **{f"t/{name}": t for name, t in tensors.items()}}
        copies = self._memory.copy(joined)
        parts = [{name[2:]: t for name, t in copies.items() if name.startswith(part)} for part in ("w/", "t/")]
        self.step, self.refusal, self._saved_at = step, None, time.monotonic()
        self.stalls.append(self._saved_at - started)
        self._thread = threading.Thread(
            target=self._write,
            args=(step, partial(write, weights=parts[0], tensors=parts[1]), reasons, self.stalls[-1]),
            name="save",
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            UserError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Lets the thread end, without a word about how: something else ends the run."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, step: int, write: Callable[[], None], reasons: list[str], stalled: float) -> None:
        started = time.thread_time()
        try:
            write()
            log.info("saved step %d", step)
            self._tidy_up(reasons)
        except NotFiniteError as error:
            self.refusal = error
            log.warning("%s", error)
        except UserError as error:
            self._failure = error
        except BaseException as error:  # whatever it is, the training must hear of it
            self._failure = UserError(f"checkpoint of step {step} was not written ({type(error).__name__}: {error})")
        self._stretch(stalled + (time.thread_time() - started) / (os.cpu_count() or 1))

    def _tidy_up(self, reasons: list[str]) -> None:
        """Removes what is answered or superseded; what cannot be removed costs room, and no run."""
        try:
            if "asked" in reasons:
                self._ask.unlink(missing_ok=True)
            for path in superseded(self._checkpoints, self._limit):
                remove(path)
        except OSError as error:
            log.warning("%s cannot be removed (%s)", error.filename or "an older checkpoint", error.strerror or error)

    def _stretch(self, cost_seconds: float) -> None:
        """Makes timed saves so rare that they cost what they may."""
        if self._interval and cost_seconds > _LARGEST_SHARE * self._interval:
            self._interval = cost_seconds / _LARGEST_SHARE
            log.info("saving takes %.1f s: from now on every %.1f minutes", cost_seconds, self._interval / 60)
