"""Groups of layers with one shape and one owner, computed as one stack: their factors and the decompositions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from llm.kfac.capture import Capture
from llm.kfac.decompositions import Decomposition, State
from llm.kfac.formulas import Formulas, Scalar
from llm.kfac.layers import Layer
from llm.kfac.packed_symmetric import folded_eye, folded_shape, folded_trace


class FactorSums:
    """The buffer for the sums that the layers of a group capture; it is allocated only while it is needed.

    The captures refer to this object and it refers to none of them, so that no reference cycle keeps a preconditioner
    in memory that is not used any more.

    Args:
        num_layers: number of layers.
        dims: rows of each layer's factors, (dim_a, dim_g).
        dtype: factor_dtype.
        device: the layers' device.
    """

    def __init__(self, num_layers: int, dims: tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> None:
        self._num_layers = num_layers
        self._dtype = dtype
        self._device = device
        self._shapes = [(num_layers, *folded_shape(n)) for n in dims]
        self._buffer: Tensor | None = None

    def of_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return views of one layer's folded sums of a a^T and g g^T, of dtype `factor_dtype`.

        Their shapes are [dim_a | 1, ceil(dim_a / 2)] and [dim_g | 1, ceil(dim_g / 2)].
        """
        sum_a, sum_g, _ = self.split(self.buffer())
        return sum_a[index], sum_g[index]

    def buffer(self) -> Tensor:
        """Return the sums of all layers and two counts a layer, as one vector; zeros at first.

        Its shape is [numbers], its dtype `factor_dtype`; `split` gives its parts.
        """
        if self._buffer is None:
            size = sum(torch.Size(shape).numel() for shape in self._shapes) + 2 * self._num_layers
            self._buffer = torch.zeros(size, dtype=self._dtype, device=self._device)
        return self._buffer

    def split(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of a vector like `buffer`, of its dtype.

        Args:
            buffer: [numbers] of dtype `factor_dtype`.

        Returns:
            Folded sums of a a^T [layers, dim_a | 1, ceil(dim_a / 2)]; folded sums of g g^T
            [layers, dim_g | 1, ceil(dim_g / 2)]; weights and numbers of rows [2, layers].
        """
        size_a, size_g = (torch.Size(shape).numel() for shape in self._shapes)
        sum_a, sum_g, counts = buffer.split([size_a, size_g, 2 * self._num_layers])
        return sum_a.view(self._shapes[0]), sum_g.view(self._shapes[1]), counts.view(2, self._num_layers)

    def release(self) -> None:
        """Free the memory of the buffer."""
        self._buffer = None


class LayerGroup:
    """A stack of layers of one shape.

    Args:
        layers: of one shape.
        offsets: when each is refreshed, as `schedule.is_refresh_due` takes it; ascending.
        owner: the rank that keeps the state.
        is_local: whether this rank keeps the state too.
        formulas: formulas of the factors.
        decomposition: how gradients are divided by the curvature.
        factor_dtype: dtype of the factors.
        new_capture: returns the capture of a layer, from the layer and a function that returns its sums.

    Attributes:
        captures: one for each layer.
        state: tensors [layers, ...] by name: `factor_a` and `factor_g`, folded; `count`, the factor updates that they
            contain; and the tensors of the decomposition. Empty if another rank keeps them.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        offsets: Sequence[float],
        *,
        owner: int,
        is_local: bool,
        formulas: Formulas,
        decomposition: Decomposition,
        factor_dtype: torch.dtype,
        new_capture: Callable[[Layer, Callable[[], tuple[Tensor, Tensor]]], Capture],
    ) -> None:
        self.layers = layers
        self.offsets = offsets
        self.owner = owner
        self.is_local = is_local
        self.formulas = formulas
        self.decomposition = decomposition
        self.factor_dtype = factor_dtype
        self.dim_a = layers[0].dim_a
        self.dim_g = layers[0].dim_g
        self._sums = FactorSums(len(layers), (self.dim_a, self.dim_g), dtype=factor_dtype, device=self.device)
        self.captures = [new_capture(layer, partial(self._sums.of_layer, index)) for index, layer in enumerate(layers)]
        self.state: State = self.empty_state() if is_local else {}
        if is_local:
            for side, n in self.sides():
                self.state[f"factor_{side}"][:] = folded_eye(n, dtype=factor_dtype, device=self.device)
            self.state["count"].zero_()
            decomposition.initialize(self.state)

    @property
    def device(self) -> torch.device:
        """The device that the layers are on."""
        return self.layers[0].weight.device

    def sides(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """Return name and rows of the two factors: ("a", dim_a) and ("g", dim_g)."""
        return ("a", self.dim_a), ("g", self.dim_g)

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape, for one layer, and the dtype of every tensor in `state`."""
        spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"count": ((), torch.float32)}
        for side, n in self.sides():
            spec[f"factor_{side}"] = folded_shape(n), self.factor_dtype
            for name, shape in self.decomposition.shapes(side, n).items():
                spec[name] = shape, self.decomposition.inv_dtype
        return spec

    def empty_state(self) -> State:
        """Return uninitialized tensors like those of `state`."""
        return {
            name: torch.empty(len(self.layers), *shape, dtype=dtype, device=self.device)
            for name, (shape, dtype) in self.state_spec().items()
        }

    def num_bytes(self, *, factors: bool) -> int:
        """Return the bytes of the factors in `state`, or of everything else in it."""
        return sum(stack.nbytes for name, stack in self.state.items() if name.startswith("factor") == factors)

    def discard(self) -> None:
        """Forget what was captured, and free its memory."""
        self._sums.release()
        for capture in self.captures:
            capture.reset()

    def take_sums(self) -> Tensor:
        """Return what this rank captured, [numbers] of dtype `factor_dtype`, and forget it.

        The vector is the buffer of `FactorSums` itself, not a copy.
        """
        buffer = self._sums.buffer()
        counts = [[capture.weight for capture in self.captures], [capture.num_rows for capture in self.captures]]
        self._sums.split(buffer)[2].copy_(torch.tensor(counts, dtype=self.factor_dtype))
        self.discard()
        return buffer

    def accumulate(
        self, sums: Tensor, decay: float, *, num_tokens: Scalar | None, loss_scale: Scalar, world: int
    ) -> None:
        """Add the sums to the moving averages of the factors, for the layers whose sums are usable.

        Args:
            sums: sum of all ranks' `take_sums`; [numbers] of dtype `factor_dtype`. It is overwritten.
            decay: largest weight of the old average.
            num_tokens: see `Formulas.scale_g`.
            loss_scale: see `Formulas.scale_g`.
            world: number of ranks.
        """
        sum_a, sum_g, (weight, num_rows) = self._sums.split(sums)
        trace_a = folded_trace(sum_a, self.dim_a)
        trace_g = folded_trace(sum_g, self.dim_g)
        usable = self.formulas.is_usable(trace_a, trace_g) & (weight > 0)
        count = self.state["count"] + usable
        ema_decay = self.formulas.ema_decay(count, decay).to(self.factor_dtype).where(usable, 1)
        scale_a = weight.reciprocal()
        scale_g = self.formulas.scale_g(weight, num_rows, num_tokens=num_tokens, loss_scale=loss_scale, world=world)
        for name, total, scale in (("factor_a", sum_a, scale_a), ("factor_g", sum_g, scale_g)):
            share = ((1 - ema_decay) * scale).where(usable, 0)
            total.masked_fill_(~usable[:, None, None], 0)  # because 0 * NaN is NaN
            self.state[name].mul_(ema_decay[:, None, None]).addcmul_(total, share[:, None, None])
        self.state["count"].copy_(count)

    def refresh(self, damping: float, is_due: Callable[[float], bool]) -> None:
        """Recompute the decompositions from the present factors.

        Args:
            damping: see `Formulas`.
            is_due: whether layers of an offset are refreshed; offsets ascend, so those layers are neighbours.
        """
        due = [index for index, offset in enumerate(self.offsets) if is_due(offset)]
        if due:
            state = {name: stack[due[0] : due[-1] + 1] for name, stack in self.state.items()}
            for side, n in self.sides():
                self.decomposition.refresh(state, side, state[f"factor_{side}"], n, damping)

    def read_gradients(self) -> Tensor:
        """Return the gradients of [W, b]^T, [layers, dim_a, dim_g] of dtype `inv_dtype`.

        With the constant input of a bias, dim_a is seldom a size that matrix products run fast with; dim_g mostly is.
        So dim_g is the last dimension.
        """
        shape = (len(self.layers), self.dim_a, self.dim_g)
        stack = torch.empty(*shape, dtype=self.decomposition.inv_dtype, device=self.device)
        for layer, gradient in zip(self.layers, stack, strict=True):
            layer.read_gradient(gradient)
        return stack

    def num_weights(self) -> int:
        """Return the number of elements of the tensor that `read_gradients` returns."""
        return len(self.layers) * self.dim_g * self.dim_a

    def write_gradients(self, directions: Tensor) -> None:
        """Replace the gradients by directions, [layers, dim_a, dim_g] or flat, of dtype `inv_dtype`."""
        for layer, direction in zip(self.layers, directions.view(-1, self.dim_a, self.dim_g), strict=True):
            layer.write_gradient(direction)
