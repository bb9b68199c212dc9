"""An updater that is not the package's, and a program that runs the trainer with it, on several ranks.

Each rank keeps one shard of every weight. The whole weights exist inside a forward and backward pass only, and hold NaN
at all other times: a rank that uses them alone, or skips a pass, spoils the run or hangs.

`python -m tests.training.sharded_trainer SCENARIOS.json` runs one scenario after another in the same processes, since
most of the time of a short run goes into its imports; see `Scenario`.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

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
        """Return the first row and the number of rows of each rank; the last rank has the remainder."""
        num_rows = length // self.size
        return [
            (rank * num_rows, num_rows if rank < self.size - 1 else length - rank * num_rows)
            for rank in range(self.size)
        ]

    def rows(self, tensor: Tensor) -> Tensor:
        """Return this rank's rows of a whole tensor."""
        return tensor.narrow(0, *self.bounds(len(tensor))[self.rank])

    def whole(self, name: str) -> Tensor:
        """Return the whole weight, on all ranks together."""
        self.calls["gather"] += 1
        result = torch.zeros_like(self.parameters[name])
        self.rows(result).copy_(self.shards[name])
        if self.size > 1:
            dist.all_reduce(result)
        return result

    def gather(self) -> None:
        """Fill the model's parameters from the shards of all ranks."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.whole(name))

    def spoil(self) -> None:
        """Overwrite the model's parameters with NaN."""
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
        unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        return ProfilingTargets(self.model, unused, NoPreconditioner(), nullcontext, lambda: None)


@dataclass(frozen=True)
class Scenario:
    """One run of the trainer.

    Attributes:
        name: also the name of the run's folder.
        port: where the ranks meet; one of its own for each scenario.
        words: the command line, without --output_dir.
        stop_at: rank 1 alone is asked to stop, the `stop_at`-th time that the training looks; 0 for never.
        votes_every: updates from one exchange of votes to the next.
        is_synchronous: whether the package's own updater is used.
        continues: name of an earlier scenario whose folder is copied, and resumed.
        from_step: the copy keeps the checkpoint of this update only; None keeps all.
    """

    name: str
    port: int
    words: list[str]
    stop_at: int = 0
    votes_every: int = 1
    is_synchronous: bool = False
    continues: str | None = None
    from_step: int | None = None


@contextmanager
def sharded_updaters(votes_every: int = 1) -> Iterator[list[ShardedUpdater]]:
    """Let the trainer use `ShardedUpdater` while the block runs; the list gets those that it builds."""
    import llm.training.run

    updaters: list[ShardedUpdater] = []

    def build(options: Any, compute: Any, model: LanguageModel, schedule: Any, plan: Any) -> ShardedUpdater:
        updaters.append(ShardedUpdater(model, rate=options.optimizer.learning_rate, votes_every=votes_every))
        return updaters[0]

    with patch.object(llm.training.run, "build_updater", build):
        yield updaters


@contextmanager
def stopped_at(number: int) -> Iterator[None]:
    """Ask this rank to stop, the `number`-th time that the training looks; opening the text does not count."""
    import llm.training.run as run

    numbers = itertools.count(1)
    is_asked = run.StopRequest.__call__
    run_updates = run.run_updates

    def ask(request: Any) -> bool:
        if next(numbers) == number:
            request.reason = "SIGTERM"
        return is_asked(request)

    def count_from_here(*arguments: Any, **named: Any) -> bool:
        stack.enter_context(patch.object(run.StopRequest, "__call__", ask))
        return run_updates(*arguments, **named)

    with ExitStack() as stack:
        stack.enter_context(patch.object(run, "run_updates", count_from_here))
        yield


def copy_run(source: Path, target: Path, step: int | None) -> None:
    """Copy a run's folder; with a step, keep no other checkpoint, as if the run had been killed after it."""
    shutil.copytree(source, target)
    for path in (target / "checkpoints").glob("step_*"):
        if step is not None and path.name != f"step_{step}":
            shutil.rmtree(path)


def run_scenario(scenario: Scenario, folder: Path, rank: int) -> None:
    """Run the trainer, and write this rank's exit code and number of calls of each method."""
    from llm.trainers.gpt import main as trainer

    os.environ["MASTER_PORT"] = str(scenario.port)
    words = [*scenario.words, "--output_dir", str(folder / scenario.name)]
    if scenario.continues is not None:
        words.append("--resume_from_checkpoint")
        if rank == 0:
            copy_run(folder / scenario.continues, folder / scenario.name, scenario.from_step)
    with ExitStack() as stack:
        updaters: list[ShardedUpdater] = []
        if not scenario.is_synchronous:
            updaters = stack.enter_context(sharded_updaters(scenario.votes_every))
        if scenario.stop_at and rank == 1:
            stack.enter_context(stopped_at(scenario.stop_at))
        code = trainer(words)
    answer = {"code": code, "calls": updaters[0].calls if updaters else {}}
    (folder / f"{scenario.name}.rank_{rank}.json").write_text(json.dumps(answer))


def main(path: Path) -> None:
    """Run all scenarios of the file on this rank."""
    for fields in json.loads(path.read_text()):
        run_scenario(Scenario(**fields), path.parent, int(os.environ["RANK"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
