"""Capture of what a layer sees in the backward passes of one step: sums of outer products.

A forward hook wraps the layer's output in an identity whose backward pass receives the gradient of the output. The
layer's input is available there, because autograd saved it, or because gradient checkpointing computed it again. So
every backward pass is captured exactly once: neither a pass without gradients nor the repeated forward pass of a
checkpoint counts. The capture is a custom operator, which torch.compile calls as a whole; a compiled model gets one
additional graph, the one with captures, and no graph breaks.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from llm.kfac.layers import Layer
from llm.kfac.packed_symmetric import add_product, add_to_last_row

# The operator that captures a layer in a backward pass, as a profiler names it.
CAPTURE_OPERATOR = "llm_kfac::record"


class CaptureSwitch:
    """Whether the passes of the current step are captured; all layers share one switch.

    Attributes:
        is_on: whether backward passes are captured.
        step: number of the current step, from 0.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.step = 0


class Capture:
    """Sums over the rows that one layer saw in its backward passes since the last `reset`.

    A row is one token of a pass. The sum of weight * a a^T with a = [x; 1] is a folded matrix [dim_a, dim_a]; the sum
    of weight * g g^T, with the gradient g as it arrives, is a folded matrix [dim_g, dim_g] (see `packed_symmetric`).

    Args:
        layer: the layer that gets the hook.
        switch: nothing is captured while it is off.
        sums: returns the two folded matrices to add to, of dtype `factor_dtype`; called in every captured pass.
        row_weight: number of rows of a pass -> weight of each.
        max_rows: rows of a pass that are used, evenly spaced; None: all.

    Attributes:
        weight: sum of the weights of all rows.
        num_rows: number of rows.
    """

    def __init__(
        self,
        layer: Layer,
        switch: CaptureSwitch,
        sums: Callable[[], tuple[Tensor, Tensor]],
        *,
        row_weight: Callable[[int], float],
        max_rows: int | None,
    ) -> None:
        self.layer = layer
        self.switch = switch
        self._sums = sums
        self._row_weight = row_weight
        self._max_rows = max_rows
        self.reset()
        self._key = next(_KEYS)
        _CAPTURES[self._key] = self
        self._hook = layer.module.register_forward_hook(_Hook(switch, self._key), with_kwargs=True)

    def reset(self) -> None:
        """Set weight and num_rows to 0; the owner of the sums clears those."""
        self.weight = 0.0
        self.num_rows = 0.0

    def close(self) -> None:
        """Remove the hook from the layer."""
        self._hook.remove()

    @torch.no_grad()
    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add one backward pass to the sums; a pass that comes after the step it belongs to is ignored.

        Args:
            inputs: of the layer; [..., num_in], of any floating point dtype.
            gradients: of the layer's outputs; [..., num_out], of any floating point dtype.
        """
        if not self.switch.is_on:
            return
        x = inputs.detach().reshape(-1, self.layer.num_in)
        g = gradients.detach().reshape(-1, self.layer.num_out)
        num_rows = x.shape[0]
        if num_rows == 0:
            return
        indices = self._sample(num_rows, x.device)
        if indices is not None:
            x = x.index_select(0, indices)
            g = g.index_select(0, indices)
        sum_a, sum_g = self._sums()
        x = x.to(sum_a.dtype)
        g = g.to(sum_g.dtype)
        weight = self._row_weight(num_rows)
        rows_per_sample = num_rows / x.shape[0]
        with torch.autocast(x.device.type, enabled=False):
            add_product(sum_a, self.layer.dim_a, x, weight * rows_per_sample)
            if self.layer.has_bias:
                add_to_last_row(sum_a, self.layer.dim_a, x.sum(0) * (weight * rows_per_sample), weight * num_rows)
            add_product(sum_g, self.layer.dim_g, g, weight * rows_per_sample)
        self.weight += weight * num_rows
        self.num_rows += num_rows

    def _sample(self, num_rows: int, device: torch.device) -> Tensor | None:
        """Return the indices of evenly spaced rows, int64 [max_rows]; None for all rows.

        The first row depends on the number of the step only, so that a repeated step uses the same rows.
        """
        if self._max_rows is None or num_rows <= self._max_rows:
            return None
        start = random.Random(self.switch.step).randrange(num_rows // self._max_rows)
        return torch.arange(self._max_rows, device=device) * num_rows // self._max_rows + start


class _Hook:
    """The forward hook of one layer; in a copy of the model, which this K-FAC does not train, it captures nothing."""

    def __init__(self, switch: CaptureSwitch, key: int) -> None:
        self.switch = switch
        self.key = key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        if not (self.switch.is_on and module.training and torch.is_grad_enabled() and output.requires_grad):
            return None
        inputs = args[0] if args else next(iter(kwargs.values()))
        return _CaptureInBackward.apply(output, inputs, self.key)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[type[_Hook], tuple[CaptureSwitch, int]]:
        return _Hook, (CaptureSwitch(), -1)


_CAPTURES: WeakValueDictionary[int, Capture] = WeakValueDictionary()
"""The captures by key: a compiled graph can hold a number, not an object."""

_KEYS = itertools.count()


class _CaptureInBackward(torch.autograd.Function):
    """The identity; its backward pass calls the operator `record`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, key: int) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.key = key
        return output.clone()  # the next operation could not change a view in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        return _record(gradient, inputs, ctx.key), None, None


# Not for CUDA graphs: a replayed graph would repeat the products, but not the counts, which Python adds.
@torch.library.custom_op(CAPTURE_OPERATOR, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _record(gradient: Tensor, inputs: Tensor, key: int) -> Tensor:
    """Add a backward pass to the capture of that key; return a copy of the gradient, so that the call is not removed.

    A compiler removes operators whose result is not used.
    """
    capture = _CAPTURES.get(key)
    if capture is not None:
        capture.add(inputs, gradient)
    return gradient.clone()


@_record.register_fake
def _(gradient: Tensor, inputs: Tensor, key: int) -> Tensor:
    return torch.empty_like(gradient)
