"""The `Updater` protocol: everything that the trainer knows about how weights are updated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from llm.data.batches.loader import Batch
from llm.models.language_model import LanguageModel
from llm.training.updaters.preconditioning import Preconditioner


def _never() -> bool:
    return False


@dataclass(frozen=True)
class DataParallelRank:
    """Which blocks this rank reads.

    The ranks of one tensor-parallel group would share a number; loaders, evaluation sums and the seed of dropout use
    this number, never the global rank.

    Attributes:
        rank: number of this data-parallel rank, 0 <= rank < size.
        size: data-parallel ranks in all.
    """

    rank: int
    size: int


@dataclass(frozen=True)
class StepVotes:
    """Requests of this rank to all ranks. The updater reads them while it makes an update: a signal may come then.

    Attributes:
        stop: whether the run should stop and save.
        save: whether a checkpoint of the weights after this update is requested.
    """

    stop: Callable[[], bool] = _never
    save: Callable[[], bool] = _never


NO_VOTES = StepVotes()


class VoteResult(NamedTuple):
    """The result of a vote, the same on all ranks: whether any of them asked for it.

    Attributes:
        stop: the run stops.
        save: a checkpoint is written.
    """

    stop: bool = False
    save: bool = False


@dataclass(frozen=True)
class StepReport:
    """The report of one update, the same on all ranks.

    Attributes:
        loss: nats a token over the global batch, before the update.
        grad_norm: norm of the whole gradient before preconditioning and clipping; fp32 scalar tensor on the device.
        lr: learning rate of the update, that of the optimizer's main group.
        skipped: the gradient was not finite, so no weight was changed, on any rank.
        loss_scale_is_falling: the update was skipped while the loss scale of fp16 still has room to fall.
        votes: what the ranks agreed on; None where this update did not exchange votes.
        abandoned: a stop came between the micro-batches, so no weight was changed, on any rank.
    """

    loss: float
    grad_norm: Tensor
    lr: float
    skipped: bool = False
    loss_scale_is_falling: bool = False
    votes: VoteResult | None = None
    abandoned: bool = False


class TensorPart(NamedTuple):
    """One rank's part of a tensor.

    Attributes:
        tensor: the part, any dtype, on any device.
        shape: of the whole tensor.
        offset: index of the part's first element in the whole tensor, one number a dimension.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the part is the whole tensor."""
        return tuple(self.tensor.shape) == self.shape


def whole(tensor: Tensor) -> TensorPart:
    """The part that is all of a tensor of any shape and dtype."""
    return TensorPart(tensor, tuple(tensor.shape), (0,) * tensor.ndim)


@dataclass(frozen=True)
class UpdaterState:
    """Everything that the next update depends on, besides the weights.

    Attributes:
        tensors: this rank's parts by name; a tensor that several ranks hold whole is taken from the lowest of them.
        numbers: values that JSON holds, the same on all ranks.
        param_groups: settings of the optimizer's groups (`lr`, `betas`, `weight_decay`, `param_names`, ...) for
            comparison with another program's checkpoint; not saved.
    """

    tensors: dict[str, TensorPart]
    numbers: dict[str, Any]
    param_groups: list[dict[str, Any]] = field(default_factory=list)


class StateReader(Protocol):
    """A saved `UpdaterState`: a rank of any world reads the slices that it needs."""

    @property
    def numbers(self) -> dict[str, Any]:
        """The saved `UpdaterState.numbers`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every whole tensor by name."""

    def read(self, name: str, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """Return a slice of a tensor, on the CPU, in the saved dtype.

        Args:
            name: one of `shapes`.
            offset: index of the slice's first element; None for the whole tensor.
            shape: of the slice.
        """


@dataclass(frozen=True)
class LoadedState:
    """A `StateReader` over tensors in memory.

    Attributes:
        tensors: whole tensors by name, on the CPU.
        numbers: see `UpdaterState.numbers`.
    """

    tensors: Mapping[str, Tensor]
    numbers: dict[str, Any]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """Return a slice of a tensor; see `StateReader.read` for shapes and dtype."""
        tensor = self.tensors[name]
        if offset is None or shape is None:
            return tensor
        return tensor[tuple(slice(first, first + length) for first, length in zip(offset, shape, strict=True))]


@dataclass(frozen=True)
class ProfilingTargets:
    """Parts of an updater that `python -m llm.bench` times, and from which the end of a run reports the cost of K-FAC.

    Attributes:
        module: the module whose forward and backward passes are timed.
        optimizer: the optimizer whose steps are timed.
        preconditioner: when it does what, and how long its steps took.
        without_gradient_sync: a context in which updates exchange no gradients.
        discard: drops what an update that raised has left (gradients, captured statistics).
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    preconditioner: Preconditioner
    without_gradient_sync: Callable[[], AbstractContextManager[None]]
    discard: Callable[[], None]


class Updater(Protocol):
    """One way to update weights: synchronous, sharded, decentralised, or a wrapper around another updater.

    `update`, `evaluation_model`, `full_weights`, `state` and `load` are collective: all ranks call them in the same
    order, and equally often.

    Attributes:
        model: the model with its loss, without any wrapper; its parameters may be this rank's shards.
        data_parallel: which blocks this rank reads.
    """

    model: LanguageModel
    data_parallel: DataParallelRank

    def update(self, micro_batches: Sequence[Batch], step: int, *, votes: StepVotes) -> StepReport:
        """Make one update from this rank's micro-batches; an abandoned or skipped one changes no weight.

        Args:
            micro_batches: equally many on all ranks, on any device (`training_batches` yields them on this rank's);
                `Batch` has shapes and dtypes.
            step: number of the update, from 0; learning rate and dropout are functions of it.
            votes: what this rank asks for.
        """

    def evaluation_model(self) -> AbstractContextManager[LanguageModel]:
        """A context with the model to evaluate: as it is, gathered, or averaged over ranks.

        Inside, all ranks make the same number of forward passes, through `forward` or `model.generate`.
        """

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole tensors of the HuggingFace model's `state_dict`, in its order, one at a time.

        All ranks iterate to the end; on rank 0 each tensor, of the shape and dtype of its parameter or buffer, is
        whole, on any device, and valid until the next one is asked for. On other ranks it may be anything. A tensor
        with several names (tied weights) comes once, under its first name.
        """

    def state(self) -> UpdaterState:
        """Return what the next update depends on besides the weights."""

    def load(self, reader: StateReader) -> None:
        """Restore what `state` returned, in a world of any size.

        Raises:
            KeyError: the state belongs to another model.
            ValueError: the state belongs to another optimizer or preconditioner.
        """

    def summary(self, *, finished: bool = False) -> list[str]:
        """Return lines for the log.

        Args:
            finished: whether all updates were made; otherwise the run is about to begin.
        """

    def profiling_targets(self) -> ProfilingTargets:
        """Return the parts that a profiler observes."""
