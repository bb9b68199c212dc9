"""Preconditioners of an update's complete gradients, before they are clipped: none, or K-FAC."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llm.config.errors import UserError
from llm.config.options import KfacOptions
from llm.kfac import KFACPreconditioner, dense_early
from llm.models.lm_head import has_linear_lm_head
from llm.models.loss import chunking_is_faster
from llm.system.device_timer import DeviceTimer, Mark
from llm.system.units import format_quantity

log = logging.getLogger(__name__)

_NUM_TIMINGS = 200


class UpdateIntervals(NamedTuple):
    """When a preconditioner does what.

    Attributes:
        factors: steps from one factor update, in the backward passes, to the next.
        period: steps after which all its work repeats.
    """

    factors: int
    period: int


class StepTiming(NamedTuple):
    """When one call of `precondition` began and ended on the device's time line.

    Attributes:
        step: calls before this one, over all starts of the run.
        begin: mark of a `DeviceTimer`.
        end: mark of a `DeviceTimer`.
    """

    step: int
    begin: Mark
    end: Mark


class Preconditioner(Protocol):
    """Replaces the gradients of an update, between its backward passes and the clipping."""

    @property
    def intervals(self) -> UpdateIntervals:
        """When it updates factors and when its work repeats."""

    @property
    def timings(self) -> Sequence[StepTiming] | None:
        """The newest calls of `precondition`, oldest first; None where it does not measure them."""

    def precondition(self, grad_norm: Tensor, *, num_tokens: Tensor, loss_scale: Tensor) -> Tensor:
        """Replace the gradients, on all ranks together; nothing is read from the device.

        Args:
            grad_norm: norm of the gradients as they are, fp32 scalar.
            num_tokens: loss tokens of the whole update, int64 scalar.
            loss_scale: ratio of the loss passed to `backward` to the mean loss per token of the whole update, fp32
                scalar.

        Returns:
            The norm of the new gradients, fp32 scalar.
        """

    def discard(self) -> None:
        """Drop what the backward passes of an update left; the update is not made."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what later updates depend on, on all ranks together and the same on all.

        Returns:
            Tensors by name, of any shape and dtype, and numbers that JSON holds.
        """

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Restore what `state` returned, on any number of ranks.

        Args:
            tensors: by name, with the shapes and dtypes that `state` gave; empty where a checkpoint holds none.
            numbers: likewise.

        Raises:
            ValueError: the state belongs to another model or to other arguments.
        """

    def summary(self) -> list[str]:
        """Return lines for the log, before the first update."""


class NoPreconditioner:
    """Leaves the gradients as they are."""

    intervals = UpdateIntervals(1, 1)
    timings: Sequence[StepTiming] | None = None

    def precondition(self, grad_norm: Tensor, *, num_tokens: Tensor, loss_scale: Tensor) -> Tensor:
        """Return `grad_norm`, an fp32 scalar, unchanged."""
        return grad_norm

    def discard(self) -> None:
        """Do nothing: nothing was captured."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return no tensors (of no shape or dtype) and no numbers."""
        return {}, {}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Warn if the checkpoint holds K-FAC state (tensors of any shape and dtype), which this run does not use."""
        if numbers:
            log.warning("the checkpoint was made with --kfac, this run has no --kfac: its K-FAC state is not used")

    def summary(self) -> list[str]:
        """Return no lines: there is nothing to report."""
        return []


class KfacPreconditioner:
    """`llm.kfac` on the model inside all wrappers.

    Args:
        model: the trained model, on its device, before torch.compile saw a batch.
        options: options of K-FAC.
        learning_rate: returns the learning rate of the update that is being made, which a KL-clip needs.
        accumulation: backward passes an update.
        tokens_per_step: tokens predicted in one update, for the estimate of K-FAC's cost.

    Raises:
        UserError: the model has no layer that K-FAC can precondition.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: KfacOptions,
        *,
        learning_rate: Callable[[], float],
        accumulation: int,
        tokens_per_step: int,
    ) -> None:
        self._options = options
        heads = chunked_lm_heads(model)
        self._kfac = _kfac_preconditioner(model, options, heads, learning_rate=learning_rate, accumulation=accumulation)
        self._parameters = list(model.parameters())
        self._tokens_per_step = tokens_per_step
        self.intervals = update_intervals(options)
        # The user did not name these layers with --kfac_skip_layers, so the log gives the reason.
        reason = "its loss is computed in chunks, without a call of the layer"
        skipped = self._kfac.report().skipped
        self._never_called = {name: reason for name in skipped if any(f"({head})" in skipped[name] for head in heads)}
        self._timer = DeviceTimer(model.device)
        period = self.intervals.period
        # Whole periods, at least two.
        self._timings: deque[StepTiming] = deque(maxlen=max(_NUM_TIMINGS, 2 * period) // period * period)
        self._step = 0

    @property
    def timings(self) -> Sequence[StepTiming] | None:
        """The newest calls of `precondition`, without the first period, in which there is more to do."""
        return self._timings

    def precondition(self, grad_norm: Tensor, *, num_tokens: Tensor, loss_scale: Tensor) -> Tensor:
        """Precondition; if each layer keeps its gradient's norm, so does the whole (fp32 scalars)."""
        begin = self._timer.record()
        self._kfac.step(num_tokens=num_tokens, loss_scale=loss_scale)
        if self._step >= self.intervals.period:
            self._timings.append(StepTiming(self._step, begin, self._timer.record()))
        self._step += 1
        return grad_norm if _keeps_norms(self._options) else norm_of(self._parameters)

    def discard(self) -> None:
        """Drop the captured statistics: no factor changes, and the update does not count."""
        self._kfac.discard()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return `KFACPreconditioner.state_dict()` (its shapes and dtypes), and apart from it the counters."""
        tensors = self._kfac.state_dict()
        return tensors, {name: tensors.pop(name) for name in ("step", "formulas")}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Restore what `state` returned (same shapes and dtypes); warn where a checkpoint holds none.

        Raises:
            ValueError: the state belongs to another model, other formulas or another --kfac_backend.
        """
        if not numbers:
            log.warning("the checkpoint holds no K-FAC state: the factors start from scratch")
        elif "step" not in numbers:
            raise ValueError("it holds the K-FAC of another --kfac_backend")
        else:
            self._kfac.load_state_dict({**tensors, **numbers})
            self._step = numbers["step"]

    def summary(self) -> list[str]:
        """Return lines about layers, memory and cost, and about options whose meaning differs from kfac-pytorch's."""
        report = self._kfac.report()
        options = self._options
        bases = "bases" if options.kfac_method == "eigen" else "inverses"
        return [
            f"K-FAC: {len(report.layers)} layers, factors every {options.kfac_factor_update_steps} and {bases} every "
            f"{options.kfac_inv_update_steps} updates; "
            f"{format_quantity(report.factor_bytes)}B of factors and {format_quantity(report.inverse_bytes)}B of "
            f"{bases} on this rank, {format_quantity(report.capture_bytes)}B more during a factor update; "
            f"computed to add matrix work of {report.cost(self._tokens_per_step):.0%} of the model's own",
            *_skipped_lines(report.skipped | self._never_called),
            *_option_meanings(options),
        ]


def update_intervals(options: KfacOptions) -> UpdateIntervals:
    """Return when K-FAC updates its factors, and after how many steps all its work repeats."""
    factors = options.kfac_factor_update_steps
    return UpdateIntervals(factors, math.lcm(factors, options.kfac_inv_update_steps))


def norm_of(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of the whole gradient of parameters of any shape: fp32 scalar."""
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def kfac_bytes(config: PretrainedConfig, options: KfacOptions) -> tuple[int, int]:
    """Return the bytes that K-FAC takes of one device's memory, at most, and of a checkpoint; zeros without --kfac.

    Nothing is allocated: the model is built from its configuration on the meta device.

    Raises:
        UserError: the model has no layer that K-FAC can precondition.
    """
    if not options.kfac:
        return 0, 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    heads = chunked_lm_heads(model)
    shared, replicated = (
        _kfac_preconditioner(
            model, options, heads, learning_rate=lambda: 0.0, accumulation=1, replicate=replicate
        ).report()
        for replicate in (False, True)
    )
    if options.kfac_backend != "llm":  # kfac-pytorch does not pack factors, and every rank keeps all of them
        factors = 4 * sum(n * n for sides in replicated.layers.values() for n in sides)
        return 2 * factors + replicated.inverse_bytes, factors
    memory = shared.factor_bytes + shared.inverse_bytes + shared.capture_bytes
    return memory, replicated.factor_bytes + replicated.inverse_bytes


def _kfac_preconditioner(
    model: PreTrainedModel,
    options: KfacOptions,
    never_called: Sequence[str],
    *,
    learning_rate: Callable[[], float],
    accumulation: int,
    replicate: bool = False,
) -> KFACPreconditioner:
    steps = options.kfac_factor_update_steps
    arguments: dict[str, Any] = {"compat": "kfac-pytorch"} if options.kfac_compat else {}
    if options.kfac_damping is not None:
        arguments["damping"] = options.kfac_damping
    if not _keeps_norms(options):
        arguments |= {"kl_clip": options.kfac_kl_clip, "lr": lambda _: learning_rate(), "rescale": None}
    try:
        return KFACPreconditioner(
            model,
            # Early refreshes of the inverses are of use only where the factors were updated too.
            factor_update_steps=steps if options.kfac_compat else dense_early(steps),
            inv_update_steps=options.kfac_inv_update_steps,
            stagger=options.kfac_spread,
            factor_decay=options.kfac_factor_decay,
            method=options.kfac_method,
            factor_tokens=options.kfac_factor_tokens,
            skip_layers=[*(options.kfac_skip_layers or ()), *never_called],
            accumulation_steps=accumulation,
            strategy="replicate" if replicate else "owner",
            **arguments,
        )
    except ValueError as error:
        raise UserError(f"--kfac: {error}") from error


def _keeps_norms(options: KfacOptions) -> bool:
    """Whether each layer's preconditioned gradient has the norm of its gradient."""
    return options.kfac_kl_clip is None and not options.kfac_compat


def chunked_lm_heads(model: PreTrainedModel) -> list[str]:
    """Return the output layer's name as a regular expression if the loss is computed in chunks, which never calls it.

    For a model on the meta device only the size of its vocabulary decides.
    """
    head = model.get_output_embeddings()
    if (
        head is None
        or not chunking_is_faster(head.weight.shape[0])
        or not (head.weight.is_meta or has_linear_lm_head(model))
    ):
        return []
    return [f"^{name}$" for name, module in model.named_modules() if module is head]


def _skipped_lines(skipped: dict[str, str]) -> list[str]:
    """Return one line with every reason once, the number of modules that it holds for and the first of them."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name or "the model itself")
    if not names:
        return []
    parts = []
    for reason, modules in names.items():
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        parts.append(f"{modules[0]}{more} ({reason})")
    return [f"K-FAC leaves to the optimizer alone: {', '.join(parts)}"]


def _option_meanings(options: KfacOptions) -> list[str]:
    """Return one line on options whose meaning differs from kfac-pytorch's; none where none of them was given."""
    if options.kfac_compat:
        return []
    parts = []
    if options.kfac_damping is not None:
        parts.append(f"--kfac_damping {options.kfac_damping:g} is a share of each layer's mean curvature")
    if options.kfac_kl_clip is not None:
        parts.append(
            f"--kfac_kl_clip {options.kfac_kl_clip:g} uses the curvature of one token's loss, and replaces the "
            "rescaling to each layer's own norm"
        )
    if not parts:
        return []
    return [f"K-FAC: {' and '.join(parts)}; kfac-pytorch means them absolutely, as --kfac_compat does"]
