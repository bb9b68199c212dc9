"""Layers of one shape and one owner, worked on as one stack: averages of their factors, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llm.kfac.capture import Capture
from llm.kfac.curvature import Curvature, State
from llm.kfac.formulas import Count, Formulas
from llm.kfac.layers import Layer
from llm.kfac.triangles import fold, folded_eye, folded_shape, folded_trace


class Group:
    """A stack of layers.

    Args:
        captures: of the layers, all of one shape.
        delays: theirs, as `schedule.is_refresh_due` wants them, ascending.
        owner: the rank that keeps the state.
        is_mine: whether this rank keeps it too.
        formulas: of the factors.
        curvature: how a gradient is divided by it.
        factor_dtype: of the factors.

    Attributes:
        state: by name, [layers, …]: `factor_a` and `factor_g` folded, `count` of the captures that they hold, and what
            the curvature keeps; empty where another rank keeps it.
    """

    def __init__(
        self,
        captures: Sequence[Capture],
        delays: Sequence[float],
        *,
        owner: int,
        is_mine: bool,
        formulas: Formulas,
        curvature: Curvature,
        factor_dtype: torch.dtype,
    ) -> None:
        self.captures, self.delays, self.owner, self.is_mine = captures, delays, owner, is_mine
        self.layers: list[Layer] = [capture.layer for capture in captures]
        self.formulas, self.curvature, self.factor_dtype = formulas, curvature, factor_dtype
        self.dim_a, self.dim_g = self.layers[0].dim_a, self.layers[0].dim_g
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

    def pack(self) -> Tensor:
        """What this rank captured, as one vector of factor_dtype; the captures are dropped."""
        parts: list[Tensor] = []
        for side, n in self.sides():
            for capture in self.captures:
                total = capture.sums.pop(side, None)  # so that sums and packed sums never stand side by side as a whole
                folded = fold(total) if total is not None else self._zeros(*folded_shape(n))
                parts.append(folded.flatten())
        counts = [[capture.weight for capture in self.captures], [capture.rows for capture in self.captures]]
        parts.append(torch.tensor(counts, dtype=self.factor_dtype, device=self.device).flatten())
        for capture in self.captures:
            capture.drop()
        return torch.cat(parts)

    def packed_size(self) -> int:
        """Numbers in `pack`."""
        return len(self.layers) * (2 + sum(n * (n + 1) // 2 for _, n in self.sides()))

    def take_in(self, packed: Tensor, decay: float, *, num_tokens: Count | None, loss_scale: Count, world: int) -> None:
        """Blends the sum of all ranks' `pack` into the factors, layer by layer, where it is finite.

        Args:
            packed: the sum.
            decay: the most that the old average counts.
            num_tokens: see `Formulas.scale_g`.
            loss_scale: the same.
            world: number of ranks.
        """
        num = len(self.layers)
        shapes = [(num, *folded_shape(n)) for _, n in self.sides()]
        sum_a, sum_g, counts = packed.split([_numel(shapes[0]), _numel(shapes[1]), 2 * num])
        weight, rows = counts.view(2, num)
        new = {side: total.view(shape) for side, total, shape in zip("ag", (sum_a, sum_g), shapes, strict=True)}
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

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.factor_dtype, device=self.device)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
