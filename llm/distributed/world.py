"""The processes of one run: which one this is, and how they agree."""

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

log = logging.getLogger(__name__)
T = TypeVar("T")

# Every rank asks for the same things in the same order, so that this numbers them alike on all.
_calls = itertools.count()

_POLL_SECONDS = 0.2
_HEARTBEAT_SECONDS = 60.0


@dataclass(frozen=True)
class World:
    """This process among those of the run; a world of one needs no process group.

    Attributes:
        rank: number of this process, 0 <= rank < size.
        size: number of processes.
        local_rank: number of this process on its node.
        device: where its tensors live.
        num_nodes: machines that the processes run on.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    num_nodes: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds the tensor up over all ranks, in place; the tensor lives on `device`."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """Rank 0's value (anything small that pickles), on every rank."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        shared: T = box[0]
        return shared

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        if self.size > 1:
            dist.barrier()

    def run_on_main(self, work: Callable[[], T], *, meanwhile: Callable[[], None] | None = None) -> T:
        """Runs `work` on rank 0, however long it takes, and gives its (small) result to all.

        Args:
            work: rank 0's.
            meanwhile: what the others do again and again while they wait.

        Raises:
            UserError: on every rank, when `work` raised it; on the others also when it raised anything else.
            Stopped: on every rank, when `work` raised it.
        """
        if self.size == 1:
            return work()
        key = f"llm/on_main/{next(_calls)}"
        if not self.is_main:
            _wait_for([key], "what rank 0 does", self.rank, meanwhile=meanwhile)
            heard = cast(tuple[T, UserError | Stopped | None], self.broadcast(None))
            if heard[1] is not None:
                heard[1].reported_elsewhere = True
                raise heard[1]
            return heard[0]
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

    def poll_on_main(self, look: Callable[[], T | None], what: str, should_stop: Callable[[], bool]) -> T | None:
        """Rank 0 looks until it sees something, which all get; None once any rank was asked to stop before that.

        Args:
            look: rank 0's; quick.
            what: what is waited for, of which rank 0 says a line a minute.
            should_stop: whether this rank was asked to stop.

        Raises:
            UserError: on every rank, when `look` raised it.
        """
        wish = f"llm/stop/{next(_calls)}"

        def is_over() -> bool:
            return should_stop() or (self.size > 1 and bool(_store().check([wish])))

        def wait() -> T | None:
            started = said = time.monotonic()
            while (found := look()) is None and not is_over():
                time.sleep(_POLL_SECONDS)
                now = time.monotonic()
                if now - said >= _HEARTBEAT_SECONDS:
                    said = now
                    log.info("waiting for %s (%d min)", what, (now - started) // 60)
            return found

        def pass_on() -> None:
            if should_stop():
                _store().set(wish, "")

        return self.run_on_main(wait, meanwhile=pass_on)

    def main_first(self, name: str, work: Callable[[], T]) -> T:
        """Runs `work` on every rank: rank 0 first, then one process a node, then the others; returns when all have.

        Meant for work that leaves a cache on disk: rank 0 does it, a node that cannot see the cache does
        its own, and everybody else finds it done. Nobody waits in a collective, which would time out
        under hours of tokenizing: the others look for keys of the process group's store and say once a
        minute what they wait for.

        Raises:
            UserError: `work` raised it, on whichever rank.
            Stopped: likewise.
        """
        if self.size == 1:
            return work()
        turn = f"llm/in_turn/{next(_calls)}"
        error_key = f"{turn}/error"
        try:
            if self.rank != 0:
                first = 0 if self.local_rank == 0 else self.rank - self.local_rank
                _wait_for([f"{turn}/{first}"], name, self.rank, error_key)
            result = work()
            _store().set(f"{turn}/{self.rank}", "")
            _wait_for([f"{turn}/{rank}" for rank in range(self.size)], name, self.rank, error_key)
            return result
        except BaseException as error:
            if not getattr(error, "reported_elsewhere", False):
                known = isinstance(error, (UserError, Stopped))
                text = str(error) if known else f"rank {self.rank} failed: {type(error).__name__}: {error}"
                _store().set(error_key, f"{getattr(error, 'exit_code', 1)} {text}")
            raise


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _wait_for(
    keys: list[str],
    what: str,
    rank: int,
    error_key: str | None = None,
    *,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Returns when other ranks have set all the keys; raises what one of them reports instead."""
    store = _store()
    started = said = time.monotonic()
    while not store.check(keys):
        if error_key is not None and store.check([error_key]):
            code, message = store.get(error_key).decode().split(" ", 1)
            if int(code) == Stopped.exit_code:
                stopped = Stopped(message)
                stopped.reported_elsewhere = True
                raise stopped
            mistake = UserError(message)
            mistake.exit_code, mistake.reported_elsewhere = int(code), True
            raise mistake
        if meanwhile is not None:
            meanwhile()
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        if now - said >= _HEARTBEAT_SECONDS:
            said = now
            log.warning("rank %d waits for %s (%d min)", rank, what, (now - started) // 60)


def launched_size() -> int:
    """The number of processes that the launcher says it started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))
