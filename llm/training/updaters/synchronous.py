"""One update of the weights with synchronised gradients: all ranks end it with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from llm.data.batches.loader import Batch
from llm.distributed.votes import DelayedVote
from llm.models.language_model import LanguageModel
from llm.models.tied_weights import first_names
from llm.system.garbage_collection import freeze_heap
from llm.tokenization import IGNORE_INDEX
from llm.training.accelerator import Compute
from llm.training.seeding import seed_micro_batch
from llm.training.updaters.base import (
    NO_VOTES,
    DataParallelRank,
    ProfilingTargets,
    StateReader,
    StepReport,
    StepVotes,
    UpdaterState,
    VoteResult,
    whole,
)
from llm.training.updaters.preconditioning import NoPreconditioner, Preconditioner, norm_of

# Prefix of a preconditioner's tensors, which are saved beside the optimizer's.
_PREFIX = "preconditioner/"
# After this many updates the optimizer, the preconditioner and compiled graphs exist.
_NUM_WARM_UP_UPDATES = 3


class SynchronousUpdater:
    """Forward, backward, precondition, clip, step: data parallel with synchronised gradients.

    Args:
        compute: device, ranks and precision.
        model: the model with its loss, on its device.
        wrapped: the same module as Accelerate prepared it, in DDP where there are several ranks;
            `forward(ids, targets, positions) -> (loss_sum, num_tokens)`.
        optimizer: steps over the model's parameters; each group's peak rate is its `initial_lr`, and that of the main
            group, which is reported, `defaults["lr"]`.
        schedule: maps update k (0-based) to the share of its peak that every learning rate has; a pure function.
        max_grad_norm: clip beyond this norm; 0 clips nothing.
        seed: seeds dropout and everything else that is random in an update.
        preconditioner: replaces the gradients before they are clipped.
    """

    def __init__(
        self,
        *,
        compute: Compute,
        model: LanguageModel,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        max_grad_norm: float,
        seed: int,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        self.model = model
        self.data_parallel = DataParallelRank(compute.world.rank, compute.world.size)
        self._accelerator = compute.accelerator
        self._world = compute.world
        self._wrapped = wrapped
        self._optimizer = optimizer
        self._schedule = schedule
        self._max_grad_norm = max_grad_norm
        self._seed = seed
        self._preconditioner = preconditioner or NoPreconditioner()
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._num_updates = 0

    def update(self, micro_batches: Sequence[Batch], step: int, *, votes: StepVotes = NO_VOTES) -> StepReport:
        """Make one update from this rank's micro-batches; see `Updater.update`."""
        device = self._world.device
        scaler = self._accelerator.scaler
        batches = [batch.to(device) for batch in micro_batches]
        num_tokens = self._world.all_reduce_sum(
            torch.stack([(batch.targets != IGNORE_INDEX).sum() for batch in batches]).sum()
        )
        loss = torch.zeros((), device=device)
        # DDP averages gradients; scaling the loss by the number of ranks turns the average into a sum.
        loss_scale = torch.full_like(loss, self.data_parallel.size)
        stop_vote = DelayedVote(self._world)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            if index > 0 and stop_vote(votes.stop()):
                return self._abandon(step, stop_vote)
            seed_micro_batch(self._seed, step, index, self.data_parallel.rank, device)
            with nullcontext() if is_last else self._accelerator.no_sync(self._wrapped):
                loss_sum, _ = self._wrapped(*batch)
                self._accelerator.backward(loss_sum * (loss_scale / num_tokens))
            loss += loss_sum.detach() / num_tokens
        stop_vote.last()  # wait for the last ballot; the votes below include its answer
        if scaler is not None:
            scaler.unscale_(self._optimizer)
            # The output gradients that K-FAC has captured are still multiplied by the loss scale of fp16.
            loss_scale = scaler.scale(loss_scale)
        grad_norm = norm_of(self._parameters)
        is_bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        ballots = [torch.full_like(loss, float(vote())) for vote in (votes.stop, votes.save)]
        sums = self._world.all_reduce_sum(torch.stack([loss, is_bad.float(), *ballots]))
        loss_value, num_bad, num_stop, num_save = sums.tolist()  # the only read that waits for this update
        skipped = num_bad > 0
        if skipped:
            self._preconditioner.discard()
        else:
            # Before the preconditioner, whose KL clip reads the learning rate of the main group.
            self._set_learning_rates(step)
            norm = self._preconditioner.precondition(grad_norm, num_tokens=num_tokens, loss_scale=loss_scale)
            if self._max_grad_norm > 0:
                nn.utils.clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm)
            self._optimizer.step()
        if scaler is not None:
            scaler.update()
        self._optimizer.zero_grad()
        self._freeze_heap_once()
        return StepReport(
            loss=loss_value,
            grad_norm=grad_norm,
            lr=self._learning_rate(step),
            skipped=skipped,
            loss_scale_is_falling=skipped and scaler is not None and scaler.get_scale() >= 1,
            votes=VoteResult(stop=num_stop > 0, save=num_save > 0),
        )

    def _abandon(self, step: int, stop_vote: DelayedVote) -> StepReport:
        """Drop the gradients of an update that a stop has interrupted, on all ranks."""
        stop_vote.last()  # the ballot that was cast with the answer
        self._discard()
        nan = torch.full((), float("nan"), device=self._world.device)
        return StepReport(
            loss=float("nan"),
            grad_norm=nan,
            lr=self._learning_rate(step),
            votes=VoteResult(stop=True),
            abandoned=True,
        )

    def _discard(self) -> None:
        self._preconditioner.discard()
        self._optimizer.zero_grad()

    def _set_learning_rates(self, step: int) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._schedule(step)

    def _learning_rate(self, step: int) -> float:
        """Learning rate of the main parameter group in this update."""
        return float(self._optimizer.defaults["lr"] * self._schedule(step))

    def _freeze_heap_once(self) -> None:
        """After a few updates all long-lived objects exist: let later garbage collections skip them."""
        self._num_updates += 1
        if self._num_updates == _NUM_WARM_UP_UPDATES:
            freeze_heap()

    @contextmanager
    def evaluation_model(self) -> Iterator[LanguageModel]:
        """The model as it is: every rank holds all weights."""
        yield self.model

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the HuggingFace model's `state_dict`, in their shapes and dtypes, tied ones once."""
        names = first_names(self.model.model)
        for name, tensor in self.model.model.state_dict().items():
            if names[name] == name:
                yield name, tensor

    def state(self) -> UpdaterState:
        """Return the optimizer's and the preconditioner's state, the same on all ranks.

        Tensors are named `<parameter>/<key>`, those of the preconditioner `preconditioner/...`.
        """
        tensors = {
            f"{name}/{key}": whole(value.detach())
            for name, parameter in self._named_parameters()
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        scaler = self._accelerator.scaler
        preconditioner_tensors, preconditioner_numbers = self._preconditioner.state()
        tensors |= {f"{_PREFIX}{name}": whole(tensor) for name, tensor in preconditioner_tensors.items()}
        numbers = {
            "optimizer": type(self._optimizer).__name__,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "preconditioner": preconditioner_numbers,
        }
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in self._optimizer.param_groups
        ]
        return UpdaterState(tensors, numbers, groups)

    def load(self, reader: StateReader) -> None:
        """Restore what `state` returned.

        Raises:
            KeyError: the tensors belong to another model.
            ValueError: they belong to another optimizer or preconditioner.
        """
        numbers = reader.numbers
        if numbers["optimizer"] != type(self._optimizer).__name__:
            raise ValueError(f"it was {numbers['optimizer']}")
        indices = {name: index for index, (name, _) in enumerate(self._named_parameters())}
        optimizer_state: dict[int, dict[str, Tensor]] = {}
        preconditioner_tensors: dict[str, Tensor] = {}
        for path in reader.shapes:
            if path.startswith(_PREFIX):
                preconditioner_tensors[path.removeprefix(_PREFIX)] = reader.read(path)
                continue
            name, key = path.rsplit("/", 1)
            optimizer_state.setdefault(indices[name], {})[key] = reader.read(path)
        # Learning rates, betas and the like come from this run's options, not from the checkpoint.
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
        scaler = self._accelerator.scaler
        if scaler is not None and numbers["scaler"] is not None:
            scaler.load_state_dict(numbers["scaler"])
        # Older checkpoints, and those of other programs, hold no preconditioner.
        self._preconditioner.load(preconditioner_tensors, numbers.get("preconditioner", {}))

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters in the optimizer's own order."""
        return [
            (name, parameter)
            for group in self._optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ]

    def summary(self, *, finished: bool = False) -> list[str]:
        """Return the preconditioner's lines before the first update, and none at the end."""
        return [] if finished else self._preconditioner.summary()

    def profiling_targets(self) -> ProfilingTargets:
        """Return the parts that a profiler observes."""
        return ProfilingTargets(
            module=self._wrapped,
            optimizer=self._optimizer,
            preconditioner=self._preconditioner,
            without_gradient_sync=lambda: self._accelerator.no_sync(self._wrapped),
            discard=self._discard,
        )
