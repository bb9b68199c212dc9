"""Symmetric matrices in half the memory: only one triangle is stored, and sent between ranks.

The lower triangle of an n x n matrix is cut at p = ceil(n / 2) into two triangles and a rectangle. The second triangle,
transposed, fills the empty half of the square of the first; the rectangle is placed below. The result is a folded
matrix of (n | 1) x p numbers (n | 1 is Python's: n if n is odd, else n + 1), which holds n (n + 1) / 2 numbers once
each. No index tensor is needed, which for large n would take more memory than the matrix.

The idea is that of LAPACK's rectangular full packed format. Source: Gustavson et al. 2010, Rectangular full packed
format for Cholesky's algorithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a triangle that are computed at once, so that most of the numbers above the diagonal are not computed.
_PANEL_ROWS = 128

# Largest matrix for which, on a CPU, one full product is faster than panels. An accelerator has more units than panels
# would fill, and always computes the full product; that was not measured.
_MAX_FULL_PRODUCT = 256

# Share of a full product that the panels of a large matrix compute: a half, and the diagonal blocks.
_PANEL_SHARE = 0.6


def folded_shape(n: int) -> tuple[int, int]:
    """Return the shape of a folded n x n matrix, which has n (n + 1) / 2 numbers."""
    return n | 1, (n + 1) // 2


def fold(matrix: Tensor) -> Tensor:
    """Fold the lower triangles of matrices; the numbers above the diagonals are not read.

    Args:
        matrix: [..., n, n] of any dtype.

    Returns:
        [..., n | 1, ceil(n / 2)] of the same dtype.
    """
    n = matrix.shape[-1]
    p, q, down = _cut(n)
    folded = matrix.new_empty(*matrix.shape[:-2], *folded_shape(n))
    folded[..., :down, :] = 0
    folded[..., down : down + p, :] = matrix[..., :p, :p].tril()
    folded[..., :q, p - q :] += matrix[..., p:, p:].tril().mT
    folded[..., down + p :, :] = matrix[..., p:, :p]
    return folded


def unfold(folded: Tensor, n: int) -> Tensor:
    """Return the lower triangles that `fold` stored, exactly, with zeros above; LAPACK reads the lower triangle only.

    Args:
        folded: [..., n | 1, ceil(n / 2)] of any dtype.
        n: rows of an unfolded matrix.

    Returns:
        [..., n, n] of the same dtype.
    """
    p, q, down = _cut(n)
    matrix = folded.new_zeros(*folded.shape[:-2], n, n)
    matrix[..., :p, :p] = folded[..., down : down + p, :].tril()
    matrix[..., p:, p:] = folded[..., :q, p - q :].triu().mT
    matrix[..., p:, :p] = folded[..., down + p :, :]
    return matrix


def add_product(folded: Tensor, n: int, rows: Tensor, weight: float) -> None:
    """Add weight * rows^T rows to a folded n x n matrix, in place.

    Args:
        folded: [n | 1, ceil(n / 2)] of any floating point dtype.
        n: rows of the unfolded matrix.
        rows: [num_rows, n], or [num_rows, n - 1] to leave the matrix's last row as it is; the same dtype.
        weight: factor of the product.
    """
    p, q, down = _cut(n)
    right = rows.shape[1] - p
    if n <= _MAX_FULL_PRODUCT or share_of_product(rows.device) == 1:
        product = rows.t() @ rows
        folded[down : down + p].add_(product[:p, :p].tril(), alpha=weight)
        folded[down + p : down + p + right].add_(product[p:, :p], alpha=weight)
        folded[:right, p - q : p - q + right].add_(product[p:, p:].triu(), alpha=weight)
        return
    head = rows[:, :p]
    tail = rows[:, p:]
    folded[down + p : down + p + right].addmm_(tail.t(), head, alpha=weight)
    for start, end in _panels(p):
        panel = head[:, start:end].t()
        target = folded[down + start : down + end]
        target[:, :start].addmm_(panel, head[:, :start], alpha=weight)
        target[:, start:end].add_((panel @ head[:, start:end]).tril(), alpha=weight)
    transposed = folded[:, p - q : p - q + right]
    for start, end in _panels(right):
        panel = tail[:, start:end].t()
        transposed[start:end, end:].addmm_(panel, tail[:, end:], alpha=weight)
        transposed[start:end, start:end].add_((panel @ tail[:, start:end]).triu(), alpha=weight)


def share_of_product(device: torch.device) -> float:
    """Return the share of a full product that `add_product` computes of a large matrix; for meta that of a CPU."""
    return _PANEL_SHARE if device.type in ("cpu", "meta") else 1.0


def add_to_last_row(folded: Tensor, n: int, row: Tensor, corner: float) -> None:
    """Add to the last row of a folded n x n matrix, n > 1, in place.

    Args:
        folded: [n | 1, ceil(n / 2)] of any floating point dtype.
        n: rows of the unfolded matrix.
        row: the first n - 1 numbers to add; [n - 1] of the same dtype.
        corner: the last number to add.
    """
    p, q, down = _cut(n)
    folded[down + n - 1].add_(row[:p])
    folded[: q - 1, p - 1].add_(row[p:])
    folded[q - 1, p - 1] += corner


def folded_eye(n: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the identity of n rows, folded: [n | 1, ceil(n / 2)] of that dtype."""
    return fold(torch.eye(n, dtype=dtype, device=device))


def folded_trace(folded: Tensor, n: int) -> Tensor:
    """Return the traces of folded matrices.

    The trace of a sum of outer products is finite only if all its numbers are.

    Args:
        folded: [..., n | 1, ceil(n / 2)] of any floating point dtype.
        n: rows of an unfolded matrix.

    Returns:
        [...] of the same dtype.
    """
    p, q, down = _cut(n)
    first = folded[..., down : down + p, :].diagonal(dim1=-2, dim2=-1)
    second = folded[..., :q, p - q :].diagonal(dim1=-2, dim2=-1)
    return first.sum(-1) + second.sum(-1)


def _cut(n: int) -> tuple[int, int, int]:
    """Return the rows of the two triangles, and by how many rows the first is placed below the second."""
    p = (n + 1) // 2
    return p, n - p, 1 - n % 2


def _panels(n: int) -> list[tuple[int, int]]:
    """Return start and end row of every panel."""
    return [(start, min(start + _PANEL_ROWS, n)) for start in range(0, n, _PANEL_ROWS)]
