"""Symmetric matrices in half the space: what is stored, and sent between ranks, is one triangle.

The lower triangle of n x n is cut at p = ceil(n / 2) into two triangles and a rectangle. The second triangle, turned,
fills the empty half of the first one's square; the rectangle stands below: (n | 1) x p numbers, none of them twice.
No index is needed, which for large n would take more memory than the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a triangle computed at once: what is on the other side of its diagonal is mostly left out.
_PANEL = 128

# Up to here one product of all is faster than its parts on a CPU; an accelerator, which was not measured, has more
# units than panels would fill.
_WHOLE = 256

# Of a whole product of a large matrix: a half, and the diagonal blocks.
_SHARE = 0.6


def folded_shape(n: int) -> tuple[int, int]:
    """The shape of a folded n x n matrix: n (n + 1) / 2 numbers."""
    return n | 1, (n + 1) // 2


def fold(matrix: Tensor) -> Tensor:
    """The lower triangles of [..., n, n] as [..., n | 1, ceil(n / 2)]; what is above the diagonals is not read."""
    n = matrix.shape[-1]
    p, q, down = _cut(n)
    folded = matrix.new_empty(*matrix.shape[:-2], *folded_shape(n))
    folded[..., :down, :] = 0
    folded[..., down : down + p, :] = matrix[..., :p, :p].tril()
    folded[..., :q, p - q :] += matrix[..., p:, p:].tril().mT
    folded[..., down + p :, :] = matrix[..., p:, :p]
    return folded


def unfold(folded: Tensor, n: int) -> Tensor:
    """The lower triangles [..., n, n] that `fold` kept, exactly, and zeros above: what LAPACK reads of a matrix."""
    p, q, down = _cut(n)
    matrix = folded.new_zeros(*folded.shape[:-2], n, n)
    matrix[..., :p, :p] = folded[..., down : down + p, :].tril()
    matrix[..., p:, p:] = folded[..., :q, p - q :].triu().mT
    matrix[..., p:, :p] = folded[..., down + p :, :]
    return matrix


def add_product(folded: Tensor, n: int, rows: Tensor, weight: float) -> None:
    """Adds weight * rows^T rows to a folded n x n matrix.

    Args:
        folded: [n | 1, ceil(n / 2)].
        n: what it is the half of.
        rows: [any, n], or [any, n - 1], which leaves the matrix's last row as it is.
        weight: of the product.
    """
    p, q, down = _cut(n)
    right = rows.shape[1] - p
    if n <= _WHOLE or share_of_product(rows.device) == 1:
        whole = rows.t() @ rows
        folded[down : down + p].add_(whole[:p, :p].tril(), alpha=weight)
        folded[down + p : down + p + right].add_(whole[p:, :p], alpha=weight)
        folded[:right, p - q : p - q + right].add_(whole[p:, p:].triu(), alpha=weight)
        return
    head, tail = rows[:, :p], rows[:, p:]
    folded[down + p : down + p + right].addmm_(tail.t(), head, alpha=weight)
    for start, end in _panels(p):
        panel, at = head[:, start:end].t(), slice(down + start, down + end)
        folded[at, :start].addmm_(panel, head[:, :start], alpha=weight)
        folded[at, start:end].add_((panel @ head[:, start:end]).tril(), alpha=weight)
    turned = folded[:, p - q : p - q + right]
    for start, end in _panels(right):
        panel = tail[:, start:end].t()
        turned[start:end, end:].addmm_(panel, tail[:, end:], alpha=weight)
        turned[start:end, start:end].add_((panel @ tail[:, start:end]).triu(), alpha=weight)


def share_of_product(device: torch.device) -> float:
    """The share of a whole product that `add_product` computes of a large matrix there; of meta that of a CPU."""
    return _SHARE if device.type in ("cpu", "meta") else 1.0


def add_to_last_row(folded: Tensor, n: int, row: Tensor, corner: float) -> None:
    """Adds n - 1 numbers and one to the last row of a folded n x n matrix with n > 1."""
    p, q, down = _cut(n)
    folded[down + n - 1].add_(row[:p])
    folded[: q - 1, p - 1].add_(row[p:])
    folded[q - 1, p - 1] += corner


def folded_eye(n: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The identity of n rows, folded."""
    return fold(torch.eye(n, dtype=dtype, device=device))


def folded_trace(folded: Tensor, n: int) -> Tensor:
    """The traces [...] of folded matrices [..., n | 1, ceil(n / 2)]; finite only if every number that matters is."""
    p, q, down = _cut(n)
    first = folded[..., down : down + p, :].diagonal(dim1=-2, dim2=-1)
    second = folded[..., :q, p - q :].diagonal(dim1=-2, dim2=-1)
    return first.sum(-1) + second.sum(-1)


def _cut(n: int) -> tuple[int, int, int]:
    """Sides of the two triangles, and how many rows the first stands lower than the second."""
    p = (n + 1) // 2
    return p, n - p, 1 - n % 2


def _panels(n: int) -> list[tuple[int, int]]:
    """Where each one starts and ends."""
    return [(start, min(start + _PANEL, n)) for start in range(0, n, _PANEL)]
