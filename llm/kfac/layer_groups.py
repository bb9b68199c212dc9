"""Layers of one shape and one owner, worked on as one stack: averages of their factors, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from llm.kfac.capture import Capture
from llm.kfac.decompositions import Curvature, State
from llm.kfac.formulas import Count, Formulas
from llm.kfac.layers import Layer
from llm.kfac.packed_symmetric import folded_eye, folded_shape, folded_trace


class FactorSums:
    """Room for what the layers of a group capture: one vector, which is there while it is needed.

    Captures hold it and it holds none, so that a preconditioner that nobody holds is gone at once.

    Args:
        num: of layers.
        dims: rows of the factors of each, of the inputs and of the outputs' gradients.
        dtype: of the factors.
        device: of the layers.
    """

    def __init__(self, num: int, dims: tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> None:
        self._num, self._dtype, self._device = num, dtype, device
        self._shapes = [(num, *folded_shape(n)) for n in dims]
        self._packed: Tensor | None = None

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        """Of one layer: folded, side by side with those of the others."""
        sum_a, sum_g, _ = self.parts(self.packed())
        return sum_a[number], sum_g[number]

    def packed(self) -> Tensor:
        """All of them, and two numbers a layer; zeros at first."""
        if self._packed is None:
            size = sum(torch.Size(shape).numel() for shape in self._shapes) + 2 * self._num
            self._packed = torch.zeros(size, dtype=self._dtype, device=self._device)
        return self._packed

    def parts(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of such a vector: sums [layers, …] of both sides, folded, and weights and rows [2, layers]."""
        of_a, of_g = (torch.Size(shape).numel() for shape in self._shapes)
        sum_a, sum_g, counts = packed.split([of_a, of_g, 2 * self._num])
        return sum_a.view(self._shapes[0]), sum_g.view(self._shapes[1]), counts.view(2, self._num)

    def drop(self) -> None:
        """Gives the memory back."""
        self._packed = None


class LayerGroup:
    """A stack of layers.

    Args:
        layers: of one shape.
        delays: theirs, as `schedule.is_refresh_due` wants them, ascending.
        owner: the rank that keeps the state.
        is_mine: whether this rank keeps it too.
        formulas: of the factors.
        curvature: how a gradient is divided by it.
        factor_dtype: of the factors.
        new_capture: of a layer, with the room for its sums.

    Attributes:
        captures: the layers'.
        state: by name, [layers, …]: `factor_a` and `factor_g` folded, `count` of the captures that they hold, and what
            the curvature keeps; empty where another rank keeps it.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        delays: Sequence[float],
        *,
        owner: int,
        is_mine: bool,
        formulas: Formulas,
        curvature: Curvature,
        factor_dtype: torch.dtype,
        new_capture: Callable[[Layer, Callable[[], tuple[Tensor, Tensor]]], Capture],
    ) -> None:
        self.layers, self.delays, self.owner, self.is_mine = layers, delays, owner, is_mine
        self.formulas, self.curvature, self.factor_dtype = formulas, curvature, factor_dtype
        self.dim_a, self.dim_g = self.layers[0].dim_a, self.layers[0].dim_g
        self._sums = FactorSums(len(layers), (self.dim_a, self.dim_g), dtype=factor_dtype, device=self.device)
        self.captures = [new_capture(layer, partial(self._sums.of, number)) for number, layer in enumerate(layers)]
        self.state: State = self.empty_state() if is_mine else {}
        if is_mine:
            for side, n in self.sides():
                self.state[f"factor_{side}"][:] = folded_eye(n, dtype=factor_dtype, device=self.device)
            self.state["count"].zero_()
            curvature.start(self.state)

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return self.layers[0].weight.device

    def sides(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """The two factors and their rows."""
        return ("a", self.dim_a), ("g", self.dim_g)

    def specification(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape, of one layer's, and dtype of every tensor in `state`."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"count": ((), torch.float32)}
        for side, n in self.sides():
            found[f"factor_{side}"] = folded_shape(n), self.factor_dtype
            found |= {name: (shape, self.curvature.dtype) for name, shape in self.curvature.shapes(side, n).items()}
        return found

    def empty_state(self) -> State:
        """Tensors as those of `state`, with nothing in them."""
        return {
            name: torch.empty(len(self.layers), *shape, dtype=dtype, device=self.device)
            for name, (shape, dtype) in self.specification().items()
        }

    def num_bytes(self, *, factors: bool) -> int:
        """Of the factors in `state`, or of all else in it."""
        return sum(stack.nbytes for name, stack in self.state.items() if name.startswith("factor") == factors)

    def drop(self) -> None:
        """Forgets what was captured, and gives its memory back."""
        self._sums.drop()
        for capture in self.captures:
            capture.forget()

    def pack(self) -> Tensor:
        """What this rank captured, as one vector of factor_dtype; it is the sums themselves, and they are dropped."""
        packed = self._sums.packed()
        counts = [[capture.weight for capture in self.captures], [capture.rows for capture in self.captures]]
        self._sums.parts(packed)[2].copy_(torch.tensor(counts, dtype=self.factor_dtype))
        self.drop()
        return packed

    def take_in(self, packed: Tensor, decay: float, *, num_tokens: Count | None, loss_scale: Count, world: int) -> None:
        """Blends the sum of all ranks' `pack` into the factors, layer by layer, where it is finite.

        Args:
            packed: the sum.
            decay: the most that the old average counts.
            num_tokens: see `Formulas.scale_g`.
            loss_scale: the same.
            world: number of ranks.
        """
        sum_a, sum_g, (weight, rows) = self._sums.parts(packed)
        new = {"a": sum_a, "g": sum_g}
        traces = [folded_trace(new[side], n) for side, n in self.sides()]
        usable = self.formulas.is_usable(*traces) & (weight > 0)
        count = self.state["count"] + usable
        memory = self.formulas.memory(count, decay).to(self.factor_dtype).where(usable, 1)
        scale_g = self.formulas.scale_g(weight, rows, num_tokens=num_tokens, loss_scale=loss_scale, world=world)
        for (side, total), scale in zip(new.items(), (weight.reciprocal(), scale_g), strict=True):
            share = ((1 - memory) * scale).where(usable, 0)
            total.masked_fill_(~usable[:, None, None], 0)  # not a number times nothing would still be none
            self.state[f"factor_{side}"].mul_(memory[:, None, None]).addcmul_(total, share[:, None, None])
        self.state["count"].copy_(count)

    def refresh(self, damping: float, is_due: Callable[[float], bool]) -> None:
        """Bases or inverses of the factors as they are now, of the layers whose delay is due."""
        due = [number for number, delay in enumerate(self.delays) if is_due(delay)]
        if due:
            state = {name: stack[due[0] : due[-1] + 1] for name, stack in self.state.items()}
            for side, n in self.sides():
                self.curvature.refresh(state, side, state[f"factor_{side}"], n, damping)

    def gradients(self) -> Tensor:
        """Of [W, b]^T, as [layers, dim_a, dim_g].

        With the constant input that a bias stands for, dim_a is seldom a number that matrix products like; dim_g mostly
        is, and so the rows are that long.
        """
        stack = torch.empty(len(self.layers), self.dim_a, self.dim_g, dtype=self.curvature.dtype, device=self.device)
        for layer, gradient in zip(self.layers, stack, strict=True):
            layer.read_gradient(gradient)
        return stack

    def num_weights(self) -> int:
        """Numbers in `gradients`."""
        return len(self.layers) * self.dim_g * self.dim_a

    def write(self, directions: Tensor) -> None:
        """Puts directions, in the shape of `gradients` or flat, where the gradients are."""
        for layer, direction in zip(self.layers, directions.view(-1, self.dim_a, self.dim_g), strict=True):
            layer.write_gradient(direction)
