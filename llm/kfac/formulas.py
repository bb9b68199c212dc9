"""What differs between this K-FAC and the formulas of kfac-pytorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Count = float | Tensor
"""A number on the host, or a scalar tensor where reading it would make the host wait."""


class Formulas:
    """Ours: factors that do not know the batch, and damping relative to them.

    With g the gradient of the mean loss over n tokens, n g is that of one token's own loss, so that
    G = n * sum g g^T = mean (n g)(n g)^T whatever n is.
    """

    name = "llm.kfac"

    dense_start = True
    """Inverses are refreshed at 1, 2, 4, 8, … too."""

    def row_weight(self, rows: int) -> float:
        """How much a row counts in the sums of one backward pass that saw so many."""
        return 1.0

    def memory(self, count: Tensor, decay: float) -> Tensor:
        """How much of the old average stays when the `count`-th factor comes in: a plain mean at first."""
        return count.reciprocal().neg().add(1).clamp(max=decay)

    def scale_g(
        self, weight: Tensor, rows: Tensor, *, num_tokens: Count | None, loss_scale: Count, world: int
    ) -> Tensor:
        """What turns sum g g^T into G.

        Args:
            weight: sum of `row_weight` over the rows of all ranks, [layers].
            rows: rows seen on all ranks, [layers].
            num_tokens: tokens in the loss; None: the rows.
            loss_scale: by what the loss that was differentiated exceeds the mean loss.
            world: number of ranks.
        """
        tokens = rows if num_tokens is None else num_tokens
        scale: Tensor = torch.ones_like(rows) * tokens / loss_scale**2
        return scale

    def is_usable(self, trace_a: Tensor, trace_g: Tensor) -> Tensor:
        """Whether the sums may enter the factors; a zero factor has no inverse, however relative the damping."""
        return trace_a.isfinite() & trace_g.isfinite() & (trace_a > 0) & (trace_g > 0)

    def damp_product(self, damping: float, mean_a: Tensor, mean_g: Tensor) -> Tensor:
        """What is added to the eigenvalues of the Kronecker product; the means are of the factors' eigenvalues."""
        return damping * mean_a * mean_g

    def damp_factor(self, damping: float, mean: Tensor) -> Tensor:
        """What is added to one factor's diagonal; both factors' together make `damp_product`."""
        return mean * math.sqrt(damping)


class KfacPytorchFormulas(Formulas):
    """Those of kfac-pytorch: factors start as the identity, the loss is a mean, the damping is absolute.

    There a factor is the mean over backward passes and ranks of mean a a^T and mean g g^T, where g is the gradient of
    that rank's own mean loss.
    """

    name = "kfac-pytorch"
    dense_start = False

    def row_weight(self, rows: int) -> float:
        """One pass counts as much as any other."""
        return 1 / rows

    def memory(self, count: Tensor, decay: float) -> Tensor:
        """The identity that a factor begins with fades like any other."""
        return torch.full_like(count, decay)

    def scale_g(
        self, weight: Tensor, rows: Tensor, *, num_tokens: Count | None, loss_scale: Count, world: int
    ) -> Tensor:
        """A mean of squares; a rank's own mean loss has `world` times the gradient that it adds to the whole."""
        return weight.reciprocal() * (world / loss_scale) ** 2

    def is_usable(self, trace_a: Tensor, trace_g: Tensor) -> Tensor:
        """Whatever is finite."""
        return trace_a.isfinite() & trace_g.isfinite()

    def damp_product(self, damping: float, mean_a: Tensor, mean_g: Tensor) -> Tensor:
        """The damping itself."""
        return torch.full_like(mean_a, damping)

    def damp_factor(self, damping: float, mean: Tensor) -> Tensor:
        """The damping itself, to either factor."""
        return torch.full_like(mean, damping)
