"""Muon: steps along the orthogonalized momentum, whose singular values are all close to one.

Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024
(https://kellerjordan.github.io/posts/muon/): Nesterov momentum, five steps of a quintic Newton-Schulz iteration with
the coefficients below, and a learning rate multiplied by sqrt(max(1, outputs / inputs)).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from llm.optim.groups import Groups
from llm.system.precision import multiplies_bf16

# Coefficients of the Newton-Schulz iteration.
_A = 3.4445
_B = -4.7750
_C = 2.0315
_NUM_ITERATIONS = 5
_SMALLEST_NORM = 1e-7
# Numbers in the matrices of one shape that are iterated together: enough to fill a GPU, little memory beside a model's
# weights.
_BATCH_NUMBERS = 1 << 25

Closure = Callable[[], float]


class Muon(Optimizer):
    """Muon for matrices.

    A group with `inputs_first` has weights [inputs, outputs], as in Conv1D; the weights of other groups are
    [outputs, inputs], as in Linear. Both get the same updates: the iteration does not depend on the orientation, and
    the scale of the learning rate takes it into account.

    Args:
        groups: of matrices, with `params` and optionally `weight_decay` and `inputs_first`.
        lr: peak learning rate.
        momentum: decay of the average of the gradients.
    """

    def __init__(self, groups: Groups, *, lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "inputs_first": False})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Update every matrix that has a gradient; return the loss of the closure, if there is one."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            momenta = [self._momentum(matrix, group["momentum"]) for matrix in matrices]
            # Transposed to [outputs, inputs] before the iteration, so that square matrices too are rounded alike.
            inputs_first = group["inputs_first"]
            directions = orthogonalize([momentum.mT if inputs_first else momentum for momentum in momenta])
            for matrix, direction in zip(matrices, directions, strict=True):
                outputs, inputs = direction.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * math.sqrt(max(1.0, outputs / inputs))
                matrix.add_(direction.mT if inputs_first else direction, alpha=-rate)
        return loss

    def _momentum(self, matrix: Tensor, decay: float) -> Tensor:
        """Return Nesterov's momentum: the running mean of gradients after one more gradient equal to the present one.

        Its shape and dtype are those of the matrix.
        """
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        state["momentum_buffer"].lerp_(matrix.grad, 1 - decay)
        return matrix.grad.lerp(state["momentum_buffer"], decay)


class MuonWithAdamW(Optimizer):
    """Muon for some groups and AdamW for the others, as one optimizer with one list of groups and one state.

    The groups of Muon come first in `param_groups`, those of AdamW after them.

    Args:
        muon: Muon with its groups.
        adamw: AdamW with the other groups; None if there are none.
    """

    def __init__(self, muon: Muon, adamw: AdamW | None) -> None:
        self._optimizers: list[Optimizer] = [muon] if adamw is None else [muon, adamw]
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        super().__init__(groups, {"lr": self._optimizers[-1].defaults["lr"]})
        self._share_state()

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters; return the loss of the closure, if there is one."""
        loss = _evaluate(closure)
        for optimizer in self._optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share_state()

    def _share_state(self) -> None:
        """Let both optimizers work on the groups and the state of this one, so that neither is stored twice."""
        groups = iter(self.param_groups)
        for optimizer in self._optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state


def orthogonalize(matrices: list[Tensor]) -> list[Tensor]:
    """Return the matrices with singular values close to one (0.7 to 1.2), and with their singular vectors.

    The computation is in bf16 if the device multiplies bf16 natively, else in fp32.

    Args:
        matrices: fp32 [rows, columns] each, on one device; shapes may differ.

    Returns:
        Matrices of the same shapes, bf16 or fp32.
    """
    results: list[Tensor] = list(matrices)
    for indices in _batches_of_equal_shape(matrices):
        wide = torch.stack([_wide(matrices[index]) for index in indices])
        for index, result in zip(indices, _newton_schulz(wide), strict=True):
            results[index] = result if matrices[index].shape == result.shape else result.mT
    return results


def _wide(matrix: Tensor) -> Tensor:
    """Return the matrix, or its transpose if that has fewer rows; the iteration multiplies matrices rows x rows."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _batches_of_equal_shape(matrices: list[Tensor]) -> Iterator[list[int]]:
    """Yield the indices of matrices that are iterated together; their shapes are equal up to a transpose."""
    indices_by_shape: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        indices_by_shape[tuple(sorted(matrix.shape))].append(index)
    for (rows, columns), indices in indices_by_shape.items():
        batch_size = max(1, _BATCH_NUMBERS // (rows * columns))
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def _newton_schulz(x: Tensor) -> Tensor:
    """Iterate five times x <- a x + (b s + c s^2) x with s = x x^T, starting from x of norm one.

    Args:
        x: fp32 [matrices, rows, columns], rows <= columns.

    Returns:
        The same shape, bf16 or fp32.
    """
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
    """Compute the same as `_newton_schulz`, with a third less work for long rows: each step is a polynomial in s.

    With p = a + b s + c s^2 the next s is p s p, and the last x is the product of all p, times the first x. Small
    singular values are squared here, which needs fp32.

    Args:
        x: fp32 [matrices, rows, columns], of norm one.

    Returns:
        fp32 [matrices, rows, columns].
    """
    square = x @ x.mT
    product = factor = _factor(square)
    for _ in range(_NUM_ITERATIONS - 1):
        square = factor @ square @ factor
        factor = _factor(square)
        product = factor @ product
    return product @ x


def _factor(square: Tensor) -> Tensor:
    """Return p = a + b s + c s^2 for s, fp32 [matrices, rows, rows]."""
    factor = torch.baddbmm(square, square, square, beta=_B, alpha=_C)
    factor.diagonal(dim1=-2, dim2=-1).add_(_A)
    return factor


def _evaluate(closure: Closure | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
