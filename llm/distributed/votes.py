"""Votes: every rank says yes or no, and all ranks learn whether any said yes."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from llm.distributed.world import World

_POLL_SECONDS = 5e-5


class DelayedVote:
    """Whether any rank has voted yes, known one call later, so that no rank waits for its neighbours.

    All ranks must call it equally often. Because every rank learns the same answer in the same call, all of them can
    leave a loop at the same iteration: none skips a forward pass that another one makes, which would hang wherever a
    forward pass gathers weights.

    Args:
        world: the ranks that vote.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Tensor, dist.Work] | None = None

    def __call__(self, vote: bool) -> bool:
        """Cast this rank's vote, and return whether any rank voted yes in the call before.

        The first call returns False. In a world of one process there is no delay: the vote itself is returned.
        """
        if self._world.size == 1:
            return vote
        answer = self.last()
        # Filled on the device: a copy from the host would wait for the work that the device has been given.
        ballot = torch.full((), float(vote), device=self._world.device)
        work = dist.all_reduce(ballot, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = (ballot, work)
        return answer

    def last(self) -> bool:
        """Return whether any rank voted yes in the last call, and wait for the answer; False before the first call."""
        if self._pending is None:
            return False
        ballot, work = self._pending
        self._pending = None
        return _read(ballot, work)


def _read(ballot: Tensor, work: dist.Work) -> bool:
    """Read a finished collective without waiting for the device's other work."""
    if ballot.device.type == "cpu":
        work.wait()
        return bool(ballot)
    # `work.wait()` and a read on the current stream would wait for the forward pass that is being computed.
    while not work.is_completed():
        time.sleep(_POLL_SECONDS)
    module = torch.get_device_module(ballot.device)
    with module.stream(module.Stream(device=ballot.device)):
        return bool(ballot)
