"""What a preconditioner says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """Layers, memory and cost.

    Costs are operations of matrix products that take as long; they are computed, not measured.

    Attributes:
        layers: name -> (rows of the factor G, rows of the factor A) of every layer that is preconditioned.
        skipped: name -> why the optimizer alone has it, for every other module with weights of its own.
        owners: name -> the rank that does the layer's work; -1 where all ranks do.
        factor_bytes: of the averages that this rank keeps.
        inverse_bytes: of the inverses, or bases, that it keeps.
        capture_bytes: of the sums that an update with a capture needs, from its first backward pass to its step; on
            every rank those of all layers, since each has seen its own tokens.
        capture_flops: of the factors of one token, where the update has a capture.
        refresh_flops: of one refresh of this rank's inverses or bases.
        step_flops: of this rank's products with gradients in every update.
        model_flops: of one token's forward and backward pass, 6 a parameter.
        factor_update_steps: updates from one capture to the next.
        inv_update_steps: updates from one refresh to the next.
        factor_tokens: tokens of an update that its capture looks at; None: all.
        world_size: ranks that share the tokens.
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
        """The matrix work that it adds to an update of so many tokens (of all ranks), as a share of the model's own.

        Of the time it is a smaller share: an update has other work than products, and that of a small model much.
        """
        captured = min(num_tokens, self.factor_tokens or num_tokens) / self.world_size
        added = (
            self.capture_flops * captured / self.factor_update_steps
            + self.refresh_flops / self.inv_update_steps
            + self.step_flops
        )
        return added / (self.model_flops * num_tokens / self.world_size)

    def __str__(self) -> str:
        """A line for the whole, then one for every layer that is left out."""
        taken = f"K-FAC on {len(self.layers)} of {len(self.layers) + len(self.skipped)} modules with weights"
        kept = f"{_mb(self.factor_bytes)} of factors and {_mb(self.inverse_bytes)} of inverses here"
        lines = [f"{taken}: {kept}, {_mb(self.capture_bytes)} more while it captures"]
        lines += [f"  left to the optimizer: {name or '(model)'}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
