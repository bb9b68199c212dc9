"""The processes (ranks) of one run: which one this is, and how all of them agree on a value or wait for each other."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from llm.config.errors import Stopped, UserError

# Ranks other than 0 show the lines of this logger alone on their consoles: what they wait for.
LOGGER_NAME = __name__

log = logging.getLogger(LOGGER_NAME)
T = TypeVar("T")

# Every rank makes the same calls in the same order, so that a call has the same number on all ranks.
_calls = itertools.count()

_POLL_SECONDS = 0.2
_HEARTBEAT_SECONDS = 60.0


@dataclass(frozen=True)
class World:
    """This process among the processes of the run; a world of one process needs no process group.

    Attributes:
        rank: number of this process, 0 <= rank < size.
        size: number of processes.
        local_rank: number of this process on its node.
        device: the device of this process's tensors.
        num_nodes: number of machines that the processes run on.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    num_nodes: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, which writes files and prints."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place, and return it.

        Args:
            tensor: any shape and dtype, the same on every rank, on `device`.
        """
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0 on every rank; the value must be small and picklable."""
        if self.size == 1:
            return value
        objects: list[Any] = [value]
        dist.broadcast_object_list(objects, src=0, device=self.device)
        received: T = objects[0]
        return received

    def broadcast_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite a tensor of any shape and dtype on `device` with rank 0's, in place, and return it."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def barrier(self) -> None:
        """Wait until every rank has called this method."""
        if self.size > 1:
            dist.barrier()

    def run_on_main(self, work: Callable[[], T], *, meanwhile: Callable[[], None] | None = None) -> T:
        """Run `work` on rank 0, however long it takes, and return its small, picklable result on every rank.

        Args:
            work: the function that rank 0 calls.
            meanwhile: a function that the other ranks call several times a second while they wait.

        Raises:
            UserError: on every rank, if `work` raised it; on the other ranks also if `work` raised any other error.
            Stopped: on every rank, if `work` raised it.
        """
        if self.size == 1:
            return work()
        key = f"llm/on_main/{next(_calls)}"
        if not self.is_main:
            _wait_for_keys([key], "what rank 0 does", self.rank, meanwhile=meanwhile)
            result, failure = cast(tuple[T, UserError | Stopped | None], self.broadcast(None))
            if failure is not None:
                failure.reported_elsewhere = True
                raise failure
            return result
        outcome: tuple[T | None, UserError | Stopped | None] = (None, None)
        try:
            outcome = (work(), None)
            return outcome[0]
        except (UserError, Stopped) as error:
            outcome = (None, error)
            raise
        except BaseException as error:
            outcome = (None, UserError(f"rank 0 failed: {type(error).__name__}: {error}"))
            raise
        finally:
            _store().set(key, "")
            self.broadcast(outcome)

    def poll_on_main(self, poll: Callable[[], T | None], what: str, should_stop: Callable[[], bool]) -> T | None:
        """Call `poll` on rank 0 until it returns a value, and return that value on every rank.

        Returns:
            the value, or None if any rank was asked to stop before there was one.

        Args:
            poll: a quick function that rank 0 calls several times a second; None means "not yet".
            what: what the ranks wait for; rank 0 logs it once a minute.
            should_stop: whether this rank has been asked to stop.

        Raises:
            UserError: on every rank, if `poll` raised it.
        """
        stop_key = f"llm/stop/{next(_calls)}"

        def is_stopped() -> bool:
            return should_stop() or (self.size > 1 and bool(_store().check([stop_key])))

        def wait() -> T | None:
            started = logged = time.monotonic()
            while (value := poll()) is None and not is_stopped():
                time.sleep(_POLL_SECONDS)
                now = time.monotonic()
                if now - logged >= _HEARTBEAT_SECONDS:
                    logged = now
                    log.info("waiting for %s (%d min)", what, (now - started) // 60)
            return value

        def pass_on_stop() -> None:
            if should_stop():
                _store().set(stop_key, "")

        return self.run_on_main(wait, meanwhile=pass_on_stop)

    def main_first(self, name: str, work: Callable[[], T]) -> T:
        """Run `work` on every rank: rank 0 first, then local rank 0 of each node, then the others.

        The method returns when all ranks have finished. It is meant for work that leaves a cache on disk: rank 0 makes
        the cache, a node that cannot see it makes its own, and all other ranks read it. The ranks do not wait in a
        collective, which would time out during hours of tokenizing: they poll keys of the process group's store, and
        log once a minute what they wait for.

        Raises:
            UserError: on every rank, if `work` raised it on any rank.
            Stopped: on every rank, if `work` raised it on any rank.
        """
        if self.size == 1:
            return work()
        turn = f"llm/in_turn/{next(_calls)}"
        error_key = f"{turn}/error"
        try:
            if self.rank != 0:
                predecessor = 0 if self.local_rank == 0 else self.rank - self.local_rank
                _wait_for_keys([f"{turn}/{predecessor}"], name, self.rank, error_key)
            result = work()
            _store().set(f"{turn}/{self.rank}", "")
            _wait_for_keys([f"{turn}/{rank}" for rank in range(self.size)], name, self.rank, error_key)
            return result
        except BaseException as error:
            if not getattr(error, "reported_elsewhere", False):
                is_expected = isinstance(error, (UserError, Stopped))
                text = str(error) if is_expected else f"rank {self.rank} failed: {type(error).__name__}: {error}"
                _store().set(error_key, f"{getattr(error, 'exit_code', 1)} {text}")
            raise


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _wait_for_keys(
    keys: list[str],
    what: str,
    rank: int,
    error_key: str | None = None,
    *,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Wait until other ranks have set all the keys; raise the error that one of them reports under `error_key`."""
    store = _store()
    started = logged = time.monotonic()
    while not store.check(keys):
        if error_key is not None and store.check([error_key]):
            raise _error_of_other_rank(store.get(error_key).decode())
        if meanwhile is not None:
            meanwhile()
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        if now - logged >= _HEARTBEAT_SECONDS:
            logged = now
            log.warning("rank %d waits for %s (%d min)", rank, what, (now - started) // 60)


def _error_of_other_rank(report: str) -> UserError | Stopped:
    """Return the error that another rank has reported as "EXIT_CODE MESSAGE"."""
    exit_code, message = report.split(" ", 1)
    if int(exit_code) == Stopped.exit_code:
        stopped = Stopped(message)
        stopped.reported_elsewhere = True
        return stopped
    error = UserError(message)
    error.exit_code = int(exit_code)
    error.reported_elsewhere = True
    return error


def launched_size() -> int:
    """Return the number of processes that the launcher says it started (WORLD_SIZE); 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
