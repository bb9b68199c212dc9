"""Symmetric matrices in half the space: what is stored, and sent between ranks, is one triangle.

The lower triangle of n x n is cut at p = ceil(n / 2) into two triangles and a rectangle. The second triangle, turned,
fills the empty half of the first one's square; the rectangle stands below: (n | 1) x p numbers, none of them twice.
No index is needed, which for large n would take more memory than the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
