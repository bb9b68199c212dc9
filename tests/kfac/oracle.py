"""K-FAC by its definition, in float64: the whole Kronecker product is built, and the linear system is solved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Rows = Mapping[str, tuple[Tensor, Tensor]]
"""By layer, in one backward pass: inputs [rows, dim_a] with the constant 1, output gradients [rows, dim_g]; float64."""


def observe(model: nn.Module, passes: Sequence[Callable[[nn.Module], Tensor]]) -> tuple[list[Rows], dict[str, Tensor]]:
    """Run the passes (model -> loss) on a float64 copy of the model, and observe every linear layer.

    Returns:
        The rows of each pass, and by layer the gradient of [W, b] over all passes, float64 [dim_g, dim_a].
    """
    model = copy.deepcopy(model).double()
    for module in model.modules():  # without checkpointing, and without changes in place
        module.reentrant = None
        module.inplace = False
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "nf") or type(layer) is nn.Linear}
    calls: list[tuple[str, Tensor, Tensor]] = []

    def keep(name: str, inputs: Tensor, output: Tensor) -> None:
        output.retain_grad()
        calls.append((name, inputs.detach(), output))

    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, output, name=name: keep(name, args[0], output))
    passes_rows: list[Rows] = []
    for run in passes:
        run(model).backward()
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        for name, inputs, output in calls:
            x = inputs.flatten(0, -2)
            if getattr(layers[name], "bias", None) is not None:
                x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
            assert output.grad is not None
            rows[name] = x, output.grad.flatten(0, -2)
        calls.clear()
        passes_rows.append(rows)
    return passes_rows, {name: gradient_of(layer) for name, layer in layers.items()}


def gradient_of(layer: nn.Module) -> Tensor:
    """Return a copy of the gradient of [W, b], [dim_g, dim_a] of the layer's dtype."""
    gradient = layer.weight.grad.clone()
    gradient = gradient.T if hasattr(layer, "nf") else gradient
    if getattr(layer, "bias", None) is not None:
        gradient = torch.cat([gradient, layer.bias.grad[:, None]], 1)
    return gradient


class Oracle:
    """A dense K-FAC.

    Args:
        damping: as of KFACPreconditioner.
        decay: factor_decay of KFACPreconditioner.
        factor_steps: steps between factor updates.
        inv_steps: steps between refreshes.
        power: as of KFACPreconditioner.
        split: whether each factor is damped separately, as by method "inverse".
        kfac_pytorch: whether the definition is that of kfac-pytorch.
        offsets: layer -> steps by which its refreshes follow the multiples of `inv_steps`.
    """

    def __init__(
        self,
        *,
        damping: float = 0.1,
        decay: float = 0.95,
        factor_steps: int = 1,
        inv_steps: int = 1,
        power: float = 1.0,
        split: bool = False,
        kfac_pytorch: bool = False,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        self.damping = damping
        self.decay = decay
        self.power = power
        self.split = split
        self.kfac_pytorch = kfac_pytorch
        self.factor_steps = factor_steps
        self.inv_steps = inv_steps
        self.offsets = offsets or {}
        self.num_steps = 0
        self.num_factor_updates = 0
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.refreshed: dict[str, tuple[Tensor, Tensor]] = {}

    def directions(self, rows: Sequence[Rows], gradients: Mapping[str, Tensor], num_tokens: int) -> dict[str, Tensor]:
        """Return the directions of the next step, float64 [dim_g, dim_a] by layer, for rows of the mean loss."""
        step = self.num_steps
        self.num_steps += 1
        if step % self.factor_steps == 0:
            self.num_factor_updates += 1
            for name in gradients:
                self._update_factors(name, rows, num_tokens)
        early = not self.kfac_pytorch and step < self.inv_steps and step in (1, 2, 4, 8, 16, 32)
        for name, factors in self.factors.items():
            offset = 0 if step < self.inv_steps else self.offsets.get(name, 0)
            if step % self.inv_steps == offset or early:
                self.refreshed[name] = factors
        return {name: self._solve(*self.refreshed[name], gradient) for name, gradient in gradients.items()}

    def _update_factors(self, name: str, passes: Sequence[Rows], num_tokens: int) -> None:
        if self.kfac_pytorch:
            a = sum(x.T @ x / len(x) for x, _ in (rows[name] for rows in passes)) / len(passes)
            g = sum(d.T @ d / len(d) for _, d in (rows[name] for rows in passes)) / len(passes)
            start = torch.eye(len(a), dtype=a.dtype), torch.eye(len(g), dtype=g.dtype)
            weight = self.decay
        else:
            x, d = (torch.cat([rows[name][side] for rows in passes]) for side in (0, 1))
            a, g = x.T @ x / len(x), num_tokens * d.T @ d
            start = a, g
            weight = min(self.decay, 1 - 1 / self.num_factor_updates)
        old = self.factors.get(name, start)
        self.factors[name] = weight * old[0] + (1 - weight) * a, weight * old[1] + (1 - weight) * g

    def _solve(self, a: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
        eye_a, eye_g = torch.eye(len(a), dtype=a.dtype), torch.eye(len(g), dtype=g.dtype)
        mean_a, mean_g = a.trace() / len(a), g.trace() / len(g)
        if self.split:
            added = (
                (self.damping, self.damping) if self.kfac_pytorch else (self.damping**0.5 * m for m in (mean_a, mean_g))
            )
            add_a, add_g = added
            curvature = torch.kron(g + add_g * eye_g, a + add_a * eye_a)
        else:
            added = self.damping if self.kfac_pytorch else self.damping * mean_a * mean_g
            curvature = torch.kron(g, a) + added * torch.kron(eye_g, eye_a)
        if self.power == 1:
            return torch.linalg.solve(curvature, gradient.flatten()).view_as(gradient)
        values, vectors = torch.linalg.eigh(curvature)
        return (vectors @ ((vectors.T @ gradient.flatten()) / values**self.power)).view_as(gradient)
