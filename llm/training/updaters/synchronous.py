"""One update of the weights, centrally: all ranks see one global batch and end with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm.data.batches.loader import Batch
from llm.system.garbage_collection import freeze_heap
from llm.tokenization import IGNORE_INDEX
from llm.training.accelerator import Compute
from llm.training.seeding import seed_micro_batch
from llm.training.updaters.preconditioning import NoPreconditioner, Preconditioner, norm_of

Wish = Callable[[], bool]
"""Whether this rank was asked to stop, or wants a checkpoint."""

# In the names of a preconditioner's tensors, which stand beside the optimizer's.
_PREFIX = "preconditioner/"
# Updates until optimizer, preconditioner and compiled graphs are there.
_NUM_UNSETTLED = 3


@dataclass(frozen=True)
class StepReport:
    """What one update says about itself.

    Attributes:
        loss: nats a token over the global batch, before the update.
        grad_norm: norm of the whole gradient before preconditioning and clipping; fp32 scalar tensor on the device.
        lr: learning rate of the update, of the optimizer's groups the main one.
        skipped: the gradient was not finite, so no weight was changed, on any rank.
        stop: some rank was asked to stop.
        abandoned: the stop came between the micro-batches, so no weight was changed, on any rank.
        save: some rank wants a checkpoint of the weights after the update.
    """

    loss: float
    grad_norm: Tensor
    lr: float
    skipped: bool
    stop: bool
    abandoned: bool = False
    save: bool = False


class SynchronousUpdater:
    """Forward, backward, precondition, clip, step: data parallel with synchronised gradients.

    Args:
        machine: device, ranks and arithmetic.
        model: the prepared `LanguageModel`; `forward(ids, targets, positions) -> (loss_sum, num_tokens)`.
        optimizer: steps over the model's parameters; each group's peak rate is its `initial_lr`, and the main one,
            which is reported, `defaults["lr"]`.
        schedule: share of its peak that every rate has in update k (0-based); a pure function.
        max_grad_norm: clip beyond this norm; 0 clips nothing.
        seed: of dropout and whatever else is random in an update.
        preconditioning: what is done to the gradients before they are clipped.
    """

    def __init__(
        self,
        *,
        machine: Compute,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        max_grad_norm: float,
        seed: int,
        preconditioning: Preconditioner | None = None,
    ) -> None:
        self.accelerator, self.world = machine.accelerator, machine.world
        self.model, self.optimizer = model, optimizer
        self.schedule, self.max_grad_norm, self.seed = schedule, max_grad_norm, seed
        self.preconditioning = preconditioning or NoPreconditioner()
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._num_made = 0

    def update(
        self,
        micro_batches: Sequence[Batch],
        step: int,
        *,
        should_stop: Wish = lambda: False,
        should_save: Wish = lambda: False,
    ) -> StepReport:
        """One update from this rank's micro-batches; the wishes are this rank's, heard by all."""
        device = self.world.device
        batches = [batch.to(device) for batch in micro_batches]
        num_tokens = self.world.all_reduce_sum(
            torch.stack([(batch.targets != IGNORE_INDEX).sum() for batch in batches]).sum()
        )
        loss = torch.zeros((), device=device)
        # DDP takes the mean over ranks; times their number it is the sum that we want.
        loss_scale = torch.full_like(loss, self.world.size)
        abandoned = False
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            if not last and (abandoned := abandoned or should_stop()):
                continue  # the last one is never left out: its backward is where the ranks meet
            seed_micro_batch(self.seed, step, index, self.world.rank, device)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss_sum, _ = self.model(*batch)
                self.accelerator.backward(loss_sum * (loss_scale / num_tokens))
            loss += loss_sum.detach() / num_tokens
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
            loss_scale = self.accelerator.scaler.scale(loss_scale)
        grad_norm = norm_of(self.parameters)
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        wishes = [torch.full_like(loss, float(wish)) for wish in (should_stop(), abandoned, should_save())]
        flags = self.world.all_reduce_sum(torch.stack([loss, bad.float(), *wishes]))
        loss_value, num_bad, num_stop, num_abandoned, num_save = flags.tolist()  # the one read of the device
        if num_bad == num_abandoned == 0:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.schedule(step)
            norm = self.preconditioning.apply(grad_norm, num_tokens=num_tokens, loss_scale=loss_scale)
            if self.max_grad_norm > 0:
                nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
            self.optimizer.step()
        else:
            self.preconditioning.discard()
        if self.accelerator.scaler is not None and num_abandoned == 0:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad()
        self._settle()
        lr = self.optimizer.defaults["lr"] * self.schedule(step)
        return StepReport(loss_value, grad_norm, lr, num_bad > 0, num_stop > 0, num_abandoned > 0, num_save > 0)

    def _settle(self) -> None:
        """What an update needs is there after some: a search for garbage has no more to look at it."""
        self._num_made += 1
        if self._num_made == _NUM_UNSETTLED:
            freeze_heap()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the next update depends on beside the weights; on all ranks together, and the same on all.

        Returns:
            Tensors named `<parameter>/<what>`, and `preconditioner/…`, which the next update changes, and numbers
            that JSON holds.
        """
        tensors = {
            f"{name}/{key}": value.detach()
            for name, parameter in self._named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        scaler = self.accelerator.scaler
        more, numbers = self.preconditioning.state()
        return tensors | {f"{_PREFIX}{name}": tensor for name, tensor in more.items()}, {
            "optimizer": type(self.optimizer).__name__,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "preconditioner": numbers,
        }

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Takes back what `state` gave.

        Raises:
            KeyError: the tensors are those of another model.
            ValueError: they are those of another optimizer, or of another preconditioner.
        """
        if numbers["optimizer"] != type(self.optimizer).__name__:
            raise ValueError(f"it was {numbers['optimizer']}")
        state: dict[int, dict[str, Tensor]] = {}
        indices = {name: index for index, (name, _) in enumerate(self._named_parameters())}
        more: dict[str, Tensor] = {}
        for path, tensor in tensors.items():
            if path.startswith(_PREFIX):
                more[path.removeprefix(_PREFIX)] = tensor
                continue
            name, key = path.rsplit("/", 1)
            state.setdefault(indices[name], {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.accelerator.scaler is not None and numbers["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(numbers["scaler"])
        # Older checkpoints, and those of other programs, have none.
        self.preconditioning.load(more, numbers.get("preconditioner", {}))

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters in the optimizer's own order."""
        return [
            (name, parameter)
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ]
