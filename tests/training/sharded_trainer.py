"""`python sharded_trainer.py COUNTS [--stop_at K] OPTIONS...`: the trainer with an updater that is not the package's.

Each rank keeps one shard of every weight. The whole weights exist inside a forward and backward pass only, and hold NaN
at all other times: a rank that uses them alone, or skips a pass, spoils the run or hangs. COUNTS is a folder that gets
the number of calls of each collective verb, one JSON file a rank.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.data.batches.loader import Batch
from llm.models.language_model import LanguageModel
from llm.models.tied_weights import first_names
from llm.training.updaters.base import (
    DataParallelRank,
    ProfilingTargets,
    StateReader,
    StepReport,
    StepVotes,
    TensorPart,
    UpdaterState,
    VoteResult,
)
from llm.training.updaters.preconditioning import NoPreconditioner

MOMENTUM = 0.9


class ShardedUpdater:
    """SGD with momentum over shards: rank r keeps rows [r * n, (r + 1) * n) of each weight's first dimension."""

    def __init__(self, model: LanguageModel, *, rate: float, votes_every: int) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.model = model
        self.data_parallel = DataParallelRank(self.rank, self.size)
        self.rate = rate
        self.votes_every = votes_every
        self.parameters = dict(model.model.named_parameters())
        self.shards = {name: self.rows(p.detach()).clone() for name, p in self.parameters.items()}
        self.moments = {name: torch.zeros_like(shard) for name, shard in self.shards.items()}
        self.calls: Counter[str] = Counter()
        model.model.register_forward_pre_hook(lambda *_: self.gather())
        model.model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else self.spoil())
        self.spoil()

    def bounds(self, length: int) -> list[tuple[int, int]]:
        """First row and number of rows of each rank; the last rank has the remainder."""
        each = length // self.size
        return [(r * each, each if r < self.size - 1 else length - r * each) for r in range(self.size)]

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(0, *self.bounds(len(tensor))[self.rank])

    def whole(self, name: str) -> Tensor:
        """Collective: the whole weight."""
        self.calls["gather"] += 1
        result = torch.zeros_like(self.parameters[name])
        self.rows(result).copy_(self.shards[name])
        if self.size > 1:
            dist.all_reduce(result)
        return result

    def gather(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.whole(name))

    def spoil(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.fill_(float("nan"))

    def update(self, micro_batches: Sequence[Batch], step: int, *, votes: StepVotes) -> StepReport:
        self.calls["update"] += 1
        num_tokens = torch.stack([(batch.targets != -100).sum() for batch in micro_batches]).sum()
        self.sum(num_tokens)
        loss = torch.zeros(())
        for batch in micro_batches:
            loss_sum, _ = self.model(*batch)
            (loss_sum / num_tokens).backward()
            loss += loss_sum.detach() / num_tokens
        self.sum(loss)
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            gradient = self.sum(parameter.grad)
            self.moments[name].mul_(MOMENTUM).add_(self.rows(gradient))
            self.shards[name].sub_(self.rate * self.moments[name])
            parameter.grad = None
        self.spoil()
        result = None
        if (step + 1) % self.votes_every == 0:
            ballots = self.sum(torch.tensor([float(votes.stop()), float(votes.save())]))
            result = VoteResult(stop=bool(ballots[0]), save=bool(ballots[1]))
        return StepReport(loss=float(loss), grad_norm=torch.ones(()), lr=self.rate, votes=result)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def evaluation_model(self) -> Iterator[LanguageModel]:
        self.calls["evaluation_model"] += 1
        yield self.model

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        self.calls["full_weights"] += 1
        names = first_names(self.model.model)
        for name in names:
            if names[name] == name:
                tensor = self.whole(name)
                yield name, tensor if self.rank == 0 else torch.full_like(tensor, float("nan"))

    def state(self) -> UpdaterState:
        self.calls["state"] += 1
        parts = {}
        for name, moment in self.moments.items():
            shape = tuple(self.parameters[name].shape)
            first = self.bounds(shape[0])[self.rank][0]
            parts[f"{name}/momentum"] = TensorPart(moment, shape, (first, *(0 for _ in shape[1:])))
        return UpdaterState(parts, {"optimizer": "sharded"})

    def load(self, reader: StateReader) -> None:
        self.calls["load"] += 1
        if reader.numbers["optimizer"] != "sharded":
            raise ValueError(f"it was {reader.numbers['optimizer']}")
        for name, moment in self.moments.items():
            first = self.bounds(len(self.parameters[name]))[self.rank][0]
            moment.copy_(reader.read(f"{name}/momentum", (first, *(0 for _ in moment.shape[1:])), moment.shape))

    def summary(self, *, finished: bool = False) -> list[str]:
        return [f"sharded: {'ended' if finished else 'begins'} on {self.size} ranks"]

    def profiling_targets(self) -> ProfilingTargets:
        nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        return ProfilingTargets(self.model, nothing, NoPreconditioner(), nullcontext, lambda: None)


def main(words: list[str]) -> int:
    """Run the trainer; `--stop_at K` stops rank 1 alone, the K-th time that the training asks it whether it should."""
    import llm.training.run as run
    from llm.trainers.gpt import main as trainer

    folder, stop_at = Path(words.pop(0)), 0
    if words[0] == "--stop_at":
        stop_at = int(words[1])
        words = words[2:]
    updaters: list[ShardedUpdater] = []

    def build(options: Any, compute: Any, model: LanguageModel, schedule: Any, plan: Any) -> ShardedUpdater:
        votes_every = int(os.environ.get("VOTES_EVERY", "1"))
        updaters.append(ShardedUpdater(model, rate=options.optimizer.learning_rate, votes_every=votes_every))
        return updaters[0]

    if os.environ.get("UPDATER") != "synchronous":
        run.build_updater = build
    if stop_at and os.environ.get("RANK") == "1":
        questions = itertools.count(1)
        is_asked = run.StopRequest.__call__
        run_updates = run.run_updates

        def ask(request: Any) -> bool:
            if next(questions) == stop_at:
                request.reason = "SIGTERM"
            return is_asked(request)

        def count_from_here(*arguments: Any, **named: Any) -> bool:
            run.StopRequest.__call__ = ask  # type: ignore[method-assign]
            return run_updates(*arguments, **named)

        run.run_updates = count_from_here
    code = trainer(words)
    for updater in updaters:
        (folder / f"rank_{updater.rank}.json").write_text(json.dumps(updater.calls))
    # torchrun would kill the other rank, which still has to write its file.
    return 0 if code == run.EXIT_STOPPED else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
