"""Muon: a step along the momentum with all its singular values made (nearly) one.

Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024
(https://kellerjordan.github.io/posts/muon/): Nesterov momentum, five steps of a quintic Newton-Schulz
iteration with these coefficients, and the rate times sqrt(max(1, outputs / inputs)).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from llm.system.precision import multiplies_bf16

_A, _B, _C = 3.4445, -4.7750, 2.0315
_NUM_ITERATIONS = 5
_SMALLEST_NORM = 1e-7
# Numbers of equal matrices that are iterated together: enough to fill a GPU, little beside a model's weights.
_BATCH_NUMBERS = 1 << 25

Groups = list[dict[str, Any]]
Closure = Callable[[], float]


class Muon(Optimizer):
    """Muon over matrices.

    A group with `inputs_first` holds weights [inputs, outputs], as Conv1D keeps them; others are [outputs, inputs],
    as Linear's. Both get the same updates: the iteration knows no orientation, and the rate's scale asks for it.
    """

    def __init__(self, groups: Groups, *, lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "inputs_first": False})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        loss = _evaluated(closure)
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            momenta = [self._momentum(matrix, group["momentum"]) for matrix in matrices]
            # Turned to [outputs, inputs] first, so that square ones are rounded alike too.
            turned = group["inputs_first"]
            directions = orthogonalized([momentum.mT if turned else momentum for momentum in momenta])
            for matrix, direction in zip(matrices, directions, strict=True):
                outputs, inputs = direction.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * math.sqrt(max(1.0, outputs / inputs))
                matrix.add_(direction.mT if turned else direction, alpha=-rate)
        return loss

    def _momentum(self, matrix: Tensor, decay: float) -> Tensor:
        """Nesterov's: what the running mean of gradients will be after one more gradient like this."""
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        state["momentum_buffer"].lerp_(matrix.grad, 1 - decay)
        return matrix.grad.lerp(state["momentum_buffer"], decay)


class MuonWithAdamW(Optimizer):
    """Muon for some groups and AdamW for the others, as one optimizer with one list of groups and one state.

    Args:
        muon: Muon over its groups.
        adamw: AdamW over the others; None if there are none.
    """

    def __init__(self, muon: Muon, adamw: AdamW | None) -> None:
        self._parts: list[Optimizer] = [muon, *([] if adamw is None else [adamw])]
        groups = [group for part in self._parts for group in part.param_groups]
        super().__init__(groups, {"lr": self._parts[-1].defaults["lr"]})
        self._share()

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters."""
        loss = _evaluated(closure)
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """The parts work on the whole's groups and state, so that neither stands twice."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state


def orthogonalized(matrices: list[Tensor]) -> list[Tensor]:
    """The matrices with their singular values moved near to one (0.7 to 1.2), and their singular vectors kept.

    Computed in bf16 where the device multiplies it natively, else in fp32.

    Args:
        matrices: [rows, columns] each, on one device.

    Returns:
        As many, of the same shapes; bf16 or fp32.
    """
    found: list[Tensor] = list(matrices)
    for numbers in _equal_shapes(matrices):
        wide = torch.stack([_wide(matrices[number]) for number in numbers])
        for number, result in zip(numbers, _newton_schulz(wide), strict=True):
            found[number] = result if matrices[number].shape == result.shape else result.mT
    return found


def _wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose where that has the fewer rows: the products of the iteration are rows x rows."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _equal_shapes(matrices: list[Tensor]) -> Iterator[list[int]]:
    """Numbers of matrices that are iterated together."""
    numbers: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        numbers[tuple(sorted(matrix.shape))].append(number)
    for (rows, columns), equal in numbers.items():
        at_once = max(1, _BATCH_NUMBERS // (rows * columns))
        yield from (equal[start : start + at_once] for start in range(0, len(equal), at_once))


def _newton_schulz(x: Tensor) -> Tensor:
    """Five times x <- a x + (b s + c s^2) x with s = x x^T, from x of norm one; x: [matrices, rows, columns]."""
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST_NORM)
    if multiplies_bf16(x.device):
        x = x.bfloat16()
    elif x.shape[-1] >= 2 * x.shape[-2]:
        return _newton_schulz_of_squares(x)
    for _ in range(_NUM_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    return x


def _newton_schulz_of_squares(x: Tensor) -> Tensor:
    """The same with a third less work for long rows: every step is a polynomial in the first s.

    With p = a + b s + c s^2 the next s is p s p, and x in the end is the product of all p, times x. Small singular
    values are squared here, which needs fp32.
    """
    square = x @ x.mT
    product = factor = _factor(square)
    for _ in range(_NUM_ITERATIONS - 1):
        square = factor @ square @ factor
        factor = _factor(square)
        product = factor @ product
    return product @ x


def _factor(square: Tensor) -> Tensor:
    factor = torch.baddbmm(square, square, square, beta=_B, alpha=_C)
    factor.diagonal(dim1=-2, dim2=-1).add_(_A)
    return factor


def _evaluated(closure: Closure | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
