"""What is done to the complete gradients of an update before they are clipped: nothing, or K-FAC."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llm.config.errors import UserError
from llm.config.options import KfacOptions
from llm.kfac import KFACPreconditioner, dense_early
from llm.models.lm_head import has_linear_lm_head
from llm.models.loss import chunking_is_faster
from llm.system.device_timer import DeviceTimer
from llm.system.units import format_quantity
from llm.training.profiling.kfac_timing import Cost, UpdateIntervals

log = logging.getLogger(__name__)


class Preconditioner(Protocol):
    """What stands between the backward passes of an update and its clipping."""

    def apply(self, grad_norm: Tensor, *, num_tokens: Tensor, loss_scale: Tensor) -> Tensor:
        """Replaces the gradients, on all ranks together.

        Args:
            grad_norm: their norm as they are.
            num_tokens: loss tokens of the whole update.
            loss_scale: by what the losses that were differentiated exceed the mean over those tokens.

        Returns:
            The norm of what stands there now; nothing is read from the device.
        """

    def discard(self) -> None:
        """The update is not made: forgets what its backward passes left."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What later updates depend on: tensors, and numbers that JSON holds; on all ranks together, the same there."""

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Takes back what `state` gave, on any number of ranks; both are empty where a checkpoint holds nothing.

        Raises:
            ValueError: it is another model's, or that of other arguments.
        """

    def lines(self, tokens_per_step: int) -> list[str]:
        """What it says of itself when a run begins."""

    def closing_lines(self) -> list[str]:
        """What it says when all updates are made."""

    def newest_seconds(self, num_updates: int) -> float | None:
        """What its newest calls of `apply` took, all together; None where it does not measure them."""

    @property
    def rhythm(self) -> UpdateIntervals:
        """When it does what."""


class NoPreconditioner:
    """Leaves the gradients as they are."""

    rhythm = UpdateIntervals(1, 1)

    def apply(self, grad_norm: Tensor, *, num_tokens: Tensor, loss_scale: Tensor) -> Tensor:
        """The norm that they have."""
        return grad_norm

    def discard(self) -> None:
        """There is nothing to forget."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nothing."""
        return {}, {}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Says what it leaves."""
        if numbers:
            log.warning("the checkpoint was made with --kfac, this run goes on without: its K-FAC state is not used")

    def lines(self, tokens_per_step: int) -> list[str]:
        """None."""
        return []

    def closing_lines(self) -> list[str]:
        """None."""
        return []

    def newest_seconds(self, num_updates: int) -> float | None:
        """There is nothing to measure."""
        return None


class KfacPreconditioner:
    """Ours, on the model inside all wrappers.

    Args:
        model: what is trained, on its device, before torch.compile saw a batch.
        options: of K-FAC.
        rate: the learning rate of the update that is being made, which a KL-clip is about.
        accumulation: backward passes an update.

    Raises:
        UserError: the model has no layer to take.
    """

    def __init__(
        self, model: PreTrainedModel, options: KfacOptions, *, rate: Callable[[], float], accumulation: int
    ) -> None:
        self._options = options
        heads = head_in_chunks(model)
        self._kfac = _preconditioner(model, options, heads, rate=rate, accumulation=accumulation)
        self._parameters = list(model.parameters())
        self.rhythm = update_intervals(options)
        # The user has not named it, and is told why.
        reason = "its loss is computed by chunks, without calling it"
        skipped = self._kfac.report().skipped
        self._uncalled = {name: reason for name in skipped if any(f"({head})" in skipped[name] for head in heads)}
        self._clock = DeviceTimer(model.device)
        self._cost = Cost(self._clock, self.rhythm)
        self._step = 0

    def apply(self, grad_norm: Tensor, *, num_tokens: Tensor, loss_scale: Tensor) -> Tensor:
        """Preconditions; where each layer keeps its gradient's norm, so does the whole."""
        begin = self._clock.record()
        self._kfac.step(num_tokens=num_tokens, loss_scale=loss_scale)
        self._cost.note(self._step, begin, self._clock.record())
        self._step += 1
        return grad_norm if _keeps_norms(self._options) else norm_of(self._parameters)

    def discard(self) -> None:
        """No factor changes, and the update does not count."""
        self._kfac.discard()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Factors, inverses in use and counts by layer; the number of updates."""
        found = self._kfac.state_dict()
        return found, {name: found.pop(name) for name in ("step", "formulas")}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Takes back `state`; says so where there is none."""
        if not numbers:
            log.warning("the checkpoint holds no state of K-FAC: its factors start anew here")
        elif "step" not in numbers:
            raise ValueError("it holds the K-FAC of another --kfac_backend")
        else:
            self._kfac.load_state_dict({**tensors, **numbers})
            self._step = numbers["step"]

    def lines(self, tokens_per_step: int) -> list[str]:
        """What is taken, what is not, memory and cost; what options from elsewhere mean here."""
        report, options = self._kfac.report(), self._options
        bases = "bases" if options.kfac_method == "eigen" else "inverses"
        return [
            f"K-FAC: {len(report.layers)} layers, factors every {options.kfac_factor_update_steps} and {bases} every "
            f"{options.kfac_inv_update_steps} updates; "
            f"{format_quantity(report.factor_bytes)}B of factors and {format_quantity(report.inverse_bytes)}B of "
            f"{bases} here, {format_quantity(report.capture_bytes)}B more while it looks at the curvature; "
            f"computed to add matrix work of {report.cost(tokens_per_step):.0%} of the model's own",
            *_lines_of_skipped(report.skipped | self._uncalled),
            *_meanings(options),
        ]

    def closing_lines(self) -> list[str]:
        """What it took, measured: beside matrix work an update has other, and a small model's has most."""
        line = self._cost.line()
        return [] if line is None else [line]

    def newest_seconds(self, num_updates: int) -> float | None:
        """As `Cost` has them."""
        return self._cost.newest_seconds(num_updates)


def update_intervals(options: KfacOptions) -> UpdateIntervals:
    """When K-FAC does what."""
    looks = options.kfac_factor_update_steps
    return UpdateIntervals(looks, math.lcm(looks, options.kfac_inv_update_steps))


def norm_of(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Of the whole gradient: fp32 scalar."""
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def kfac_bytes(config: PretrainedConfig, options: KfacOptions) -> tuple[int, int]:
    """Bytes that K-FAC takes of one device's memory, at most, and of a checkpoint; 0 without --kfac.

    Nothing is allocated: the model is what the configuration describes.

    Raises:
        UserError: the model has no layer to take.
    """
    if not options.kfac:
        return 0, 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    heads = head_in_chunks(model)
    mine, whole = (
        _preconditioner(model, options, heads, rate=lambda: 0.0, accumulation=1, replicate=replicate).report()
        for replicate in (False, True)
    )
    if options.kfac_backend != "llm":  # its factors are not folded, and every rank keeps all
        factors = 4 * sum(n * n for sides in whole.layers.values() for n in sides)
        return 2 * factors + whole.inverse_bytes, factors
    return mine.factor_bytes + mine.inverse_bytes + mine.capture_bytes, whole.factor_bytes + whole.inverse_bytes


def _preconditioner(
    model: PreTrainedModel,
    options: KfacOptions,
    uncalled: Sequence[str],
    *,
    rate: Callable[[], float],
    accumulation: int,
    replicate: bool = False,
) -> KFACPreconditioner:
    steps = options.kfac_factor_update_steps
    given: dict[str, Any] = {"compat": "kfac-pytorch"} if options.kfac_compat else {}
    if options.kfac_damping is not None:
        given["damping"] = options.kfac_damping
    if not _keeps_norms(options):
        given |= {"kl_clip": options.kfac_kl_clip, "lr": lambda _: rate(), "rescale": None}
    try:
        return KFACPreconditioner(
            model,
            # A refresh of the early updates is of use only where the factors were looked at anew.
            factor_update_steps=steps if options.kfac_compat else dense_early(steps),
            inv_update_steps=options.kfac_inv_update_steps,
            stagger=options.kfac_spread,
            factor_decay=options.kfac_factor_decay,
            method=options.kfac_method,
            factor_tokens=options.kfac_factor_tokens,
            skip_layers=[*(options.kfac_skip_layers or ()), *uncalled],
            accumulation_steps=accumulation,
            strategy="replicate" if replicate else "owner",
            **given,
        )
    except ValueError as error:
        raise UserError(f"--kfac: {error}") from error


def _keeps_norms(options: KfacOptions) -> bool:
    """Whether each layer's direction has the norm of its gradient."""
    return options.kfac_kl_clip is None and not options.kfac_compat


def head_in_chunks(model: PreTrainedModel) -> list[str]:
    """The head's name, as an expression, where the loss is computed by chunks, which never calls it.

    Of a model without values only the size of its vocabulary can be asked.
    """
    head = model.get_output_embeddings()
    if (
        head is None
        or not chunking_is_faster(head.weight.shape[0])
        or not (head.weight.is_meta or has_linear_lm_head(model))
    ):
        return []
    return [f"^{name}$" for name, module in model.named_modules() if module is head]


def _lines_of_skipped(skipped: dict[str, str]) -> list[str]:
    """Every reason once, with the number of the modules that it holds for and the first of them."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name or "the model itself")
    if not names:
        return []
    parts = [
        f"{held[0]}{f' and {len(held) - 1} more' if held[1:] else ''} ({reason})" for reason, held in names.items()
    ]
    return [f"K-FAC leaves to the optimizer alone: {', '.join(parts)}"]


def _meanings(options: KfacOptions) -> list[str]:
    """What numbers given for kfac-pytorch do here, in one line; none where they mean the same, or none was given."""
    if options.kfac_compat:
        return []
    parts = []
    if options.kfac_damping is not None:
        parts.append(f"--kfac_damping {options.kfac_damping:g} is a share of each layer's mean curvature")
    if options.kfac_kl_clip is not None:
        parts.append(
            f"--kfac_kl_clip {options.kfac_kl_clip:g} is of the curvature of one token's loss, and takes the place of "
            "each layer's own norm"
        )
    if not parts:
        return []
    return [f"K-FAC: {' and '.join(parts)}; kfac-pytorch means them absolutely, as --kfac_compat does"]
