"""The formulas of this package's K-FAC, and those of kfac-pytorch where the two differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Scalar = float | Tensor
"""A number on the host, or a scalar tensor on the device, which is used without waiting for its value."""


class Formulas:
    """Formulas of this package: factors do not depend on the size of the batch, and the damping is relative to them.

    With g the gradient of the mean loss over n tokens, n g is the gradient of one token's own loss, so that
    G = n * sum g g^T = mean (n g)(n g)^T for every n.
    """

    name = "llm.kfac"
    """Stored in checkpoints."""

    refreshes_early = True
    """Whether inverses are also refreshed at the steps 1, 2, 4, 8, …."""

    def row_weight(self, num_rows: int) -> float:
        """Return the weight of a row in the sums of a backward pass with so many rows: 1."""
        return 1.0

    def ema_decay(self, count: Tensor, decay: float) -> Tensor:
        """Return the weight of the old average in the factor update number `count`: min(decay, 1 - 1 / count).

        Source: Martens & Grosse 2015 (arXiv:1503.05671), section 5.

        Args:
            count: factor updates including this one, >= 1; fp32 [layers].
            decay: largest weight of the old average.

        Returns:
            fp32 [layers]. The average is a plain mean of all factors while 1 - 1 / count is below `decay`.
        """
        return count.reciprocal().neg().add(1).clamp(max=decay)

    def scale_g(
        self, weight: Tensor, rows: Tensor, *, num_tokens: Scalar | None, loss_scale: Scalar, world: int
    ) -> Tensor:
        """Return the number that turns sum g g^T into G, for each layer: num_tokens / loss_scale^2.

        Args:
            weight: sum of `row_weight` over the rows of all ranks; [layers] of dtype `factor_dtype`.
            rows: number of rows on all ranks; [layers] of dtype `factor_dtype`.
            num_tokens: tokens in the loss; None: as many as rows.
            loss_scale: ratio of the loss passed to `backward` to the mean loss.
            world: number of ranks.

        Returns:
            [layers] of dtype `factor_dtype`.
        """
        tokens = rows if num_tokens is None else num_tokens
        scale: Tensor = torch.ones_like(rows) * tokens / loss_scale**2
        return scale

    def is_usable(self, trace_a: Tensor, trace_g: Tensor) -> Tensor:
        """Return which layers' sums may enter the factors: bool [layers].

        A zero factor is left out, because no relative damping makes it invertible.

        Args:
            trace_a: traces of the sums of a a^T; [layers] of dtype `factor_dtype`.
            trace_g: traces of the sums of g g^T; [layers] of dtype `factor_dtype`.
        """
        return trace_a.isfinite() & trace_g.isfinite() & (trace_a > 0) & (trace_g > 0)

    def damp_product(self, damping: float, mean_a: Tensor, mean_g: Tensor) -> Tensor:
        """Return lambda, which is added to the eigenvalues of the Kronecker product: damping * mean_a * mean_g.

        Args:
            damping: share of the factors' mean eigenvalues.
            mean_a: mean eigenvalue of each A; [layers] of dtype `inv_dtype`.
            mean_g: mean eigenvalue of each G; [layers] of dtype `inv_dtype`.

        Returns:
            [layers] of dtype `inv_dtype`.
        """
        return damping * mean_a * mean_g

    def damp_factor(self, damping: float, mean: Tensor) -> Tensor:
        """Return the number that is added to the diagonal of one factor; those of A and G multiply to `damp_product`.

        Source: Martens & Grosse 2015 (arXiv:1503.05671), section 6.3, with pi from the traces:
        pi * sqrt(lambda) = sqrt(damping) * mean(A), and sqrt(lambda) / pi = sqrt(damping) * mean(G).

        Args:
            damping: as of `damp_product`.
            mean: mean eigenvalue of each factor; fp32 or fp64 [layers].

        Returns:
            [layers], of the dtype of `mean`.
        """
        return mean * math.sqrt(damping)


class KfacPytorchFormulas(Formulas):
    """Formulas of kfac-pytorch: factors start as the identity, the loss is a mean, the damping is absolute.

    A factor is the mean over backward passes and ranks of mean a a^T and mean g g^T, where g is the gradient of
    that rank's own mean loss.

    Source: https://github.com/gpauloski/kfac-pytorch, version 0.4, `kfac/layers/base.py`, `eigen.py` and `inverse.py`.
    """

    name = "kfac-pytorch"
    refreshes_early = False

    def row_weight(self, num_rows: int) -> float:
        """Return 1 / num_rows, so that every backward pass has the same weight."""
        return 1 / num_rows

    def ema_decay(self, count: Tensor, decay: float) -> Tensor:
        """Return `decay` for every count, fp32 [layers]; the initial identity decays like any factor."""
        return torch.full_like(count, decay)

    def scale_g(
        self, weight: Tensor, rows: Tensor, *, num_tokens: Scalar | None, loss_scale: Scalar, world: int
    ) -> Tensor:
        """Return (world / loss_scale)^2 / weight, [layers] of dtype `factor_dtype`; `num_tokens` is not used.

        The gradient of a rank's own mean loss is `world` times the gradient that the rank adds to that of the whole
        batch.
        """
        return weight.reciprocal() * (world / loss_scale) ** 2

    def is_usable(self, trace_a: Tensor, trace_g: Tensor) -> Tensor:
        """Return which layers have finite sums; bool [layers]."""
        return trace_a.isfinite() & trace_g.isfinite()

    def damp_product(self, damping: float, mean_a: Tensor, mean_g: Tensor) -> Tensor:
        """Return the damping itself for every layer; [layers] of dtype `inv_dtype`."""
        return torch.full_like(mean_a, damping)

    def damp_factor(self, damping: float, mean: Tensor) -> Tensor:
        """Return the damping itself, for A and for G; [layers], of the dtype of `mean`."""
        return torch.full_like(mean, damping)
