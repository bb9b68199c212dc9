"""What the layers saw in the backward passes of one update: sums of products, nothing else.

A forward hook puts a tap on the layer's output; when the gradient comes back through it, the layer's input is at hand
as it was saved for that purpose, or computed again under gradient checkpointing. So every real backward pass counts
once: no pass without gradients does, nor the repeated forward of a checkpoint. `record` is an operator of its own,
which torch.compile calls without looking inside; a compiled model has one more graph, with the taps, and no breaks.
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


class CaptureSwitch:
    """Whether this update's passes are captured, and which update it is; shared by all layers."""

    def __init__(self) -> None:
        self.is_open = False
        self.step = 0


class Capture:
    """Sums over the rows that one layer saw in the backward passes since they were last dropped.

    The first is weight * a a^T with a = [x; 1], [dim_a, dim_a] folded; the second weight * g g^T with g as it came,
    [dim_g, dim_g] folded.

    Args:
        layer: whose hook this is.
        gate: closed, nothing is captured.
        room: where the sums are, asked for at every pass.
        row_weight: of each row of a pass, by their number.
        max_rows: of a pass that are looked at; None: all.

    Attributes:
        weight: of all rows together.
        rows: how many there were.
    """

    def __init__(
        self,
        layer: Layer,
        gate: CaptureSwitch,
        room: Callable[[], tuple[Tensor, Tensor]],
        *,
        row_weight: Callable[[int], float],
        max_rows: int | None,
    ) -> None:
        self.layer, self.gate = layer, gate
        self._room, self._row_weight, self._max_rows = room, row_weight, max_rows
        self.forget()
        self._key = next(_KEYS)
        _CAPTURES[self._key] = self
        self._hook = layer.module.register_forward_hook(_Hook(gate, self._key), with_kwargs=True)

    def forget(self) -> None:
        """That there were rows; the room is somebody else's to clear."""
        self.weight = self.rows = 0.0

    def close(self) -> None:
        """Takes the hook off the layer."""
        self._hook.remove()

    @torch.no_grad()
    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """One backward pass: inputs [..., num_in] and gradients of the outputs [..., num_out], of any dtype.

        Nothing of one that comes after its update's step.
        """
        if not self.gate.is_open:
            return
        x, g = inputs.detach().reshape(-1, self.layer.num_in), gradients.detach().reshape(-1, self.layer.num_out)
        rows = x.shape[0]
        if rows == 0:
            return
        chosen = self._choose(rows, x.device)
        x, g = (each.index_select(0, chosen) if chosen is not None else each for each in (x, g))
        sum_a, sum_g = self._room()
        x, g = x.to(sum_a.dtype), g.to(sum_g.dtype)
        weight, share = self._row_weight(rows), rows / x.shape[0]
        with torch.autocast(x.device.type, enabled=False):
            add_product(sum_a, self.layer.dim_a, x, weight * share)
            if self.layer.has_bias:
                add_to_last_row(sum_a, self.layer.dim_a, x.sum(0) * (weight * share), weight * rows)
            add_product(sum_g, self.layer.dim_g, g, weight * share)
        self.weight += weight * rows
        self.rows += rows

    def _choose(self, rows: int, device: torch.device) -> Tensor | None:
        """Evenly spaced rows, others in every update, the same whenever it is made again; None for all of them."""
        if self._max_rows is None or rows <= self._max_rows:
            return None
        start = random.Random(self.gate.step).randrange(rows // self._max_rows)
        return torch.arange(self._max_rows, device=device) * rows // self._max_rows + start


class _Hook:
    """The forward hook of one layer. That of a copied model, which is not ours to train, captures nothing."""

    def __init__(self, gate: CaptureSwitch, key: int) -> None:
        self.gate, self.key = gate, key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        if not (self.gate.is_open and module.training and torch.is_grad_enabled() and output.requires_grad):
            return None
        inputs = args[0] if args else next(iter(kwargs.values()))
        return _Tap.apply(output, inputs, self.key)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[type[_Hook], tuple[CaptureSwitch, int]]:
        return _Hook, (CaptureSwitch(), -1)


_CAPTURES: WeakValueDictionary[int, Capture] = WeakValueDictionary()
"""A graph can hold a number, not an object."""

_KEYS = itertools.count()


class _Tap(torch.autograd.Function):
    """The identity; on the way back `record` is called."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, key: int) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.key = key
        return output.clone()  # a view could not be changed in place by what follows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        return _record(gradient, inputs, ctx.key), None, None


# A recorded CUDA graph would repeat the products and not the counting.
@torch.library.custom_op("llm_kfac::record", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _record(gradient: Tensor, inputs: Tensor, key: int) -> Tensor:
    """Adds to the capture of that key; gives the gradient as it is, so that no compiler takes the call away."""
    capture = _CAPTURES.get(key)
    if capture is not None:
        capture.add(inputs, gradient)
    return gradient.clone()


@_record.register_fake
def _(gradient: Tensor, inputs: Tensor, key: int) -> Tensor:
    return torch.empty_like(gradient)
