"""Layers, memory and cost of a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """Layers, memory and cost.

    Costs count the operations of matrix products that take as long. They are computed, not measured.

    Attributes:
        layers: name -> (rows of the factor G, rows of the factor A), for every preconditioned layer.
        skipped: name -> reason, for every other module with weights of its own; the optimizer alone updates those.
        owners: name -> the rank that computes for the layer; -1 if all ranks do.
        factor_bytes: bytes of the factors that this rank keeps.
        inverse_bytes: bytes of the inverses, or eigenbases, that this rank keeps.
        capture_bytes: bytes of the sums that a factor update needs from its first backward pass to its step. Every rank
            has those of all layers, because each rank has seen its own tokens.
        capture_flops: operations for the factors of one token, in a step with a factor update.
        refresh_flops: operations of one refresh of this rank's inverses or eigenbases.
        step_flops: operations of this rank's products with gradients in every step.
        model_flops: operations of one token's forward and backward pass, 6 for each parameter.
        factor_update_steps: steps from one factor update to the next.
        inv_update_steps: steps from one refresh to the next.
        factor_tokens: tokens of a step that a factor update uses; None: all.
        world_size: number of ranks that share the tokens.
    """

    layers: dict[str, tuple[int, int]]
    skipped: dict[str, str]
    owners: dict[str, int]
    factor_bytes: int
    inverse_bytes: int
    capture_bytes: int
    capture_flops: float
    refresh_flops: float
    step_flops: float
    model_flops: float
    factor_update_steps: int
    inv_update_steps: int
    factor_tokens: int | None
    world_size: int

    def cost(self, num_tokens: int) -> float:
        """Return the matrix work that K-FAC adds to a step, as a share of the model's own.

        The share of wall time is lower, because a step also does work other than matrix products; for a small model
        that is much of the time.

        Args:
            num_tokens: tokens in a step, on all ranks.
        """
        captured = min(num_tokens, self.factor_tokens or num_tokens) / self.world_size
        added = (
            self.capture_flops * captured / self.factor_update_steps
            + self.refresh_flops / self.inv_update_steps
            + self.step_flops
        )
        return added / (self.model_flops * num_tokens / self.world_size)

    def __str__(self) -> str:
        """Return one line with the totals, then one line for every skipped module."""
        taken = f"K-FAC on {len(self.layers)} of {len(self.layers) + len(self.skipped)} modules with weights"
        memory = (
            f"{_megabytes(self.factor_bytes)} of factors and {_megabytes(self.inverse_bytes)} of inverses on this rank"
        )
        lines = [f"{taken}: {memory}, {_megabytes(self.capture_bytes)} more during a factor update"]
        lines += [f"  left to the optimizer: {name or '(model)'}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
