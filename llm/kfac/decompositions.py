"""Decompositions of the factors, and their use on gradients, for stacks of layers of one shape.

A decomposition keeps its tensors in a state that starts as that of identity factors, is refreshed from the factors at
some steps, and preconditions gradients in every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from llm.kfac.formulas import Formulas
from llm.kfac.packed_symmetric import unfold

State = dict[str, Tensor]
"""Tensors by name, [layers, ...] each."""

# Numbers in the matrices that are decomposed at once: enough to fill a device, and little memory beside the model's.
_BATCH = 2**24

# Matrices of up to so many rows are decomposed in float64, which costs nothing at that size: most of the rounding error
# of a direction comes from the eigenvectors.
_MAX_ROWS_IN_FLOAT64 = 64


class Decomposition(ABC):
    """How gradients are divided by the Kronecker product of the factors.

    Args:
        formulas: formulas of the damping.
        inv_dtype: dtype of the state, and of the products with gradients.
    """

    refresh_cost: float
    """Time of the refresh of one n x n factor, in units of n^3 operations of a matrix product."""

    num_products: int
    """Number of matrix products of a gradient with each of the two factors."""

    def __init__(self, formulas: Formulas, inv_dtype: torch.dtype) -> None:
        self.formulas = formulas
        self.inv_dtype = inv_dtype

    @abstractmethod
    def shapes(self, side: str, n: int) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of the tensors kept for one layer's factor with n rows; side is "a" or "g"."""

    @abstractmethod
    def initialize(self, state: State) -> None:
        """Set the state to that of identity factors."""

    @abstractmethod
    def refresh(self, state: State, side: str, factors: Tensor, n: int, damping: float) -> None:
        """Recompute the state of one side from the factors, in place.

        Args:
            state: [layers, ...] of dtype `inv_dtype`.
            side: "a" or "g".
            factors: folded matrices [layers, n | 1, ceil(n / 2)] of dtype `factor_dtype`.
            n: rows of a factor.
            damping: see `Formulas`.
        """

    @abstractmethod
    def precondition(self, state: State, gradients: Tensor, damping: float) -> Tensor:
        """Return the directions: the gradients divided by the curvature, computed in place.

        Args:
            state: [layers, ...] of dtype `inv_dtype`.
            gradients: of [W, b]^T; [layers, dim_a, dim_g] of dtype `inv_dtype`.
            damping: see `Formulas`.

        Returns:
            `gradients`, overwritten by the directions; same shape and dtype.
        """


class Eigen(Decomposition):
    """Eigendecompositions: Qa [(Qa^T D Qg) / (da dg^T + lambda)^power] Qg^T for the gradient D of [W, b]^T.

    At power 1 this is the exact inverse of the damped Kronecker product.

    Source: Pauloski et al. 2020 (arXiv:2007.00784), for power 1.
    """

    refresh_cost = 10.0  # measured on CPUs: eigh takes the time of a product of 5 n^3 multiplications
    num_products = 2

    def __init__(self, formulas: Formulas, inv_dtype: torch.dtype, power: float) -> None:
        super().__init__(formulas, inv_dtype)
        self.power = power

    def shapes(self, side: str, n: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of an orthonormal basis, in columns, and of the eigenvalues."""
        return {f"basis_{side}": (n, n), f"values_{side}": (n,)}

    def initialize(self, state: State) -> None:
        """Set the bases to the identity and the eigenvalues to one."""
        for side in "ag":
            _fill_identity(state[f"basis_{side}"])
            state[f"values_{side}"].fill_(1)

    def refresh(self, state: State, side: str, factors: Tensor, n: int, damping: float) -> None:
        """Decompose the factors, [layers, n | 1, ceil(n / 2)] of dtype `factor_dtype`, into bases and eigenvalues.

        The damping is not used here: `precondition` adds it to the product of the eigenvalues in every step.
        """
        has_float64 = factors.device.type != "mps"
        dtype = torch.float64 if n <= _MAX_ROWS_IN_FLOAT64 and has_float64 else torch.float32
        for part, matrices in _batches(factors, n):
            values, basis = torch.linalg.eigh(matrices.to(torch.promote_types(matrices.dtype, dtype)))
            state[f"values_{side}"][part] = values.clamp_(min=0).to(self.inv_dtype)
            state[f"basis_{side}"][part] = basis.to(self.inv_dtype)

    def precondition(self, state: State, gradients: Tensor, damping: float) -> Tensor:
        """Divide in place by the damped curvature ^ power, in the eigenbasis; see `Decomposition.precondition`.

        The gradients are [layers, dim_a, dim_g] of dtype `inv_dtype`.
        """
        basis_a = state["basis_a"]
        basis_g = state["basis_g"]
        values_a = state["values_a"]
        values_g = state["values_g"]
        added = self.formulas.damp_product(damping, values_a.mean(-1), values_g.mean(-1))
        added.clamp_(min=torch.finfo(added.dtype).tiny)
        half = torch.bmm(basis_a.mT, gradients)
        rotated = torch.bmm(half, basis_g, out=gradients)
        curvature = torch.baddbmm(added[:, None, None], values_a[:, :, None], values_g[:, None, :], out=half)
        rotated /= curvature if self.power == 1 else curvature.pow_(self.power)
        return torch.bmm(torch.bmm(basis_a, rotated, out=half), basis_g.mT, out=gradients)


class Inverse(Decomposition):
    """Inverses of the damped factors: (A + la)^-1 D (G + lg)^-1 for the gradient D of [W, b]^T, with la lg = lambda.

    It needs half of the products of `Eigen`, and its refresh is cheaper.

    Source: Martens & Grosse 2015 (arXiv:1503.05671), section 6.3.
    """

    refresh_cost = 1.5  # measured on CPUs, as that of `Eigen`
    num_products = 1

    def shapes(self, side: str, n: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of the inverse of the damped factor."""
        return {f"inverse_{side}": (n, n)}

    def initialize(self, state: State) -> None:
        """Set the inverses to the identity, without damping."""
        for side in "ag":
            _fill_identity(state[f"inverse_{side}"])

    def refresh(self, state: State, side: str, factors: Tensor, n: int, damping: float) -> None:
        """Invert the damped factors, [layers, n | 1, ceil(n / 2)] of dtype `factor_dtype`, by Cholesky factorization.

        Matrices whose factorization fails keep their previous inverse.
        """
        for part, matrices in _batches(factors, n):
            diagonal = matrices.diagonal(dim1=-2, dim2=-1)
            diagonal += self.formulas.damp_factor(damping, diagonal.mean(-1))[:, None]
            triangle, failures = torch.linalg.cholesky_ex(matrices)
            inverse = torch.cholesky_inverse(triangle).to(self.inv_dtype)
            previous = state[f"inverse_{side}"][part]
            torch.where((failures == 0)[:, None, None], inverse, previous, out=previous)

    def precondition(self, state: State, gradients: Tensor, damping: float) -> Tensor:
        """Multiply gradients, [layers, dim_a, dim_g] of dtype `inv_dtype`, by the inverses of the damped factors."""
        return torch.bmm(torch.bmm(state["inverse_a"], gradients), state["inverse_g"], out=gradients)


def _fill_identity(matrices: Tensor) -> None:
    """Set matrices [layers, n, n] to the identity, in place."""
    matrices.zero_().diagonal(dim1=-2, dim2=-1).fill_(1)


def _batches(factors: Tensor, n: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the stack, and their matrices' lower triangles [some, n, n] in float32 or better."""
    size = max(1, _BATCH // n**2)
    for start in range(0, factors.shape[0], size):
        part = slice(start, start + size)
        yield part, unfold(factors[part].to(torch.promote_types(factors.dtype, torch.float32)), n)
