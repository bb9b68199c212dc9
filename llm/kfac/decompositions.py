"""From factors to directions: eigenbases, or inverses, of stacks of layers of one shape.

Both keep a state of tensors that begins as the identity, is refreshed now and then, and is used in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from llm.kfac.formulas import Formulas
from llm.kfac.packed_symmetric import unfold

State = dict[str, Tensor]

# Numbers in the matrices that are decomposed at once: enough to fill a device, little beside the model.
_BATCH = 2**24


# Up to so many rows a matrix is decomposed in float64, which costs nothing there: most of the rounding is in the bases.
_SMALL = 64


class Curvature(ABC):
    """What divides a gradient by the curvature.

    Args:
        formulas: of the damping.
        dtype: of what is kept, and of the products with gradients.
    """

    flops_of_refresh: float
    """Of one n x n factor, in n^3: what it costs in time, counted in a matrix product's operations."""

    products: int
    """Matrix products of a gradient, each with both factors."""

    def __init__(self, formulas: Formulas, dtype: torch.dtype) -> None:
        self.formulas, self.dtype = formulas, dtype

    @abstractmethod
    def shapes(self, side: str, n: int) -> dict[str, tuple[int, ...]]:
        """The tensors kept for the factor of one layer (side: "a" or "g") and its n rows, by name."""

    @abstractmethod
    def start(self, state: State) -> None:
        """Makes the state that of identity factors."""

    @abstractmethod
    def refresh(self, state: State, side: str, factors: Tensor, n: int, damping: float) -> None:
        """Takes in folded factors [layers, n | 1, ceil(n / 2)] of one side."""

    @abstractmethod
    def directions(self, state: State, gradients: Tensor, damping: float) -> Tensor:
        """Gradients [layers, dim_a, dim_g] divided by the curvature, in their place."""


class Eigen(Curvature):
    """Qa [(Qa^T W^T Qg) / (da dg^T + lambda)^power] Qg^T: the damped Kronecker product's exact inverse at power 1."""

    flops_of_refresh = 10.0  # measured on CPUs: eigh takes the time of a product of 5 n^3 multiplications
    products = 2

    def __init__(self, formulas: Formulas, dtype: torch.dtype, power: float) -> None:
        super().__init__(formulas, dtype)
        self.power = power

    def shapes(self, side: str, n: int) -> dict[str, tuple[int, ...]]:
        """An orthonormal basis in columns, and the eigenvalues."""
        return {f"basis_{side}": (n, n), f"values_{side}": (n,)}

    def start(self, state: State) -> None:
        """Bases of unit vectors, eigenvalues of one."""
        for side in "ag":
            _fill_identity(state[f"basis_{side}"])
            state[f"values_{side}"].fill_(1)

    def refresh(self, state: State, side: str, factors: Tensor, n: int, damping: float) -> None:
        """The damping is not used: it is added to the eigenvalues of the product, in every update anew."""
        exact = torch.float64 if n <= _SMALL and factors.device.type != "mps" else torch.float32  # which has none
        for part, matrices in _batches(factors, n):
            values, basis = torch.linalg.eigh(matrices.to(torch.promote_types(matrices.dtype, exact)))
            state[f"values_{side}"][part] = values.clamp_(min=0).to(self.dtype)
            state[f"basis_{side}"][part] = basis.to(self.dtype)

    def directions(self, state: State, gradients: Tensor, damping: float) -> Tensor:
        """Into the eigenbasis, divided, and back."""
        basis_a, basis_g = state["basis_a"], state["basis_g"]
        values_a, values_g = state["values_a"], state["values_g"]
        added = self.formulas.damp_product(damping, values_a.mean(-1), values_g.mean(-1))
        added.clamp_(min=torch.finfo(added.dtype).tiny)
        half = torch.bmm(basis_a.mT, gradients)
        turned = torch.bmm(half, basis_g, out=gradients)
        curvature = torch.baddbmm(added[:, None, None], values_a[:, :, None], values_g[:, None, :], out=half)
        turned /= curvature if self.power == 1 else curvature.pow_(self.power)
        return torch.bmm(torch.bmm(basis_a, turned, out=half), basis_g.mT, out=gradients)


class Inverse(Curvature):
    """(A + la)^-1 W^T (G + lg)^-1 with la lg = lambda: half the products of the eigenbasis, and a cheaper refresh."""

    flops_of_refresh = 1.5  # measured on CPUs, as that of `Eigen`
    products = 1

    def shapes(self, side: str, n: int) -> dict[str, tuple[int, ...]]:
        """The inverse."""
        return {f"inverse_{side}": (n, n)}

    def start(self, state: State) -> None:
        """Identities."""
        for side in "ag":
            _fill_identity(state[f"inverse_{side}"])

    def refresh(self, state: State, side: str, factors: Tensor, n: int, damping: float) -> None:
        """By Cholesky; what rounding has left without an inverse keeps its last one."""
        for part, matrices in _batches(factors, n):
            diagonal = matrices.diagonal(dim1=-2, dim2=-1)
            diagonal += self.formulas.damp_factor(damping, diagonal.mean(-1))[:, None]
            triangle, failures = torch.linalg.cholesky_ex(matrices)
            inverse = torch.cholesky_inverse(triangle).to(self.dtype)
            kept = state[f"inverse_{side}"][part]
            torch.where((failures == 0)[:, None, None], inverse, kept, out=kept)

    def directions(self, state: State, gradients: Tensor, damping: float) -> Tensor:
        """Two products; the damping is in the inverses."""
        return torch.bmm(torch.bmm(state["inverse_a"], gradients), state["inverse_g"], out=gradients)


def _fill_identity(matrices: Tensor) -> None:
    matrices.zero_().diagonal(dim1=-2, dim2=-1).fill_(1)


def _batches(factors: Tensor, n: int) -> Iterator[tuple[slice, Tensor]]:
    """The lower triangles [some, n, n], in float32 or better, and which of the stack they are."""
    size = max(1, _BATCH // n**2)
    for start in range(0, factors.shape[0], size):
        part = slice(start, start + size)
        yield part, unfold(factors[part].to(torch.promote_types(factors.dtype, torch.float32)), n)
