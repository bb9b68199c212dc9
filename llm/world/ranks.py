"""The processes of one run: which one this is, and how they agree."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llm.config.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

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
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds the tensor up over all ranks, in place; the tensor lives on `device`."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, value: T) -> T:
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

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 and gives its (small) result to all; its `UserError` is raised on all."""
        outcome: tuple[Any, UserError | None] = (None, None)
        if self.is_main:
            try:
                outcome = (work(), None)
            except UserError as error:
                outcome = (None, error)
        result, mistake = self.share(outcome)
        if mistake is not None:
            mistake.is_echo = not self.is_main
            raise mistake
        value: T = result
        return value

    def in_turn(self, name: str, work: Callable[[], T]) -> T:
        """Runs `work` on every rank: rank 0 first, then one process a node, then the others.

        Meant for work that leaves a cache on disk: rank 0 does it, a node that cannot see the cache does
        its own, and everybody else finds it done. Nobody waits in a collective, which would time out
        under hours of tokenizing: the others look for a key of the process group's store and say once a
        minute what they wait for.

        Raises:
            UserError: `work` raised it, here or on the rank that was waited for.
        """
        if self.size == 1:
            return work()
        first_of_node = self.rank - self.local_rank
        outcome = "failed"
        try:
            # In here, so that whoever waits for this rank hears of an error that it only waited for.
            if self.rank != 0:
                waits_for = 0 if self.local_rank == 0 else first_of_node
                _wait_for(f"llm/{name}/{waits_for}", f"rank {self.rank} waits for rank {waits_for}: {name}")
            result = work()
            outcome = "done"
            return result
        except UserError as error:
            outcome = f"error {error.exit_code} {error}"
            raise
        finally:
            if self.local_rank == 0:
                dist.distributed_c10d._get_default_store().set(f"llm/{name}/{self.rank}", outcome)


def _wait_for(key: str, sentence: str) -> None:
    """Returns when another rank has set the key to `done`; raises what it reports otherwise."""
    store = dist.distributed_c10d._get_default_store()
    started = said = time.monotonic()
    while not store.check([key]):
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        if now - said >= _HEARTBEAT_SECONDS:
            said = now
            log.warning("%s (%d min)", sentence, (now - started) // 60)
    outcome = store.get(key).decode()
    if outcome == "done":
        return
    if outcome.startswith("error "):
        _, code, message = outcome.split(" ", 2)
        mistake = UserError(message)
        mistake.exit_code, mistake.is_echo = int(code), True
        raise mistake
    raise UserError(f"{sentence}; it failed (see its own message)")


def launched_size() -> int:
    """The number of processes that the launcher says it started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))
