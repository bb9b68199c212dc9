"""K-FAC as its definition says it, in float64: the whole Kronecker product is built, and solved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Seen = Mapping[str, tuple[Tensor, Tensor]]
"""Of one backward pass, by layer: [rows, dim_a] with the constant 1, and gradients of the outputs [rows, dim_g]."""


def observe(model: nn.Module, passes: Sequence[Callable[[nn.Module], Tensor]]) -> tuple[list[Seen], dict[str, Tensor]]:
    """Runs the passes (model -> loss) on a float64 copy of the model, and looks at every linear layer.

    Returns:
        What each pass showed, and the gradient of [W, b] of all passes together as [dim_g, dim_a], by layer.
    """
    model = copy.deepcopy(model).double()
    for module in model.modules():  # nothing is computed twice, or changed once it was seen
        module.reentrant, module.inplace = None, False
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "nf") or type(layer) is nn.Linear}
    met: list[tuple[str, Tensor, Tensor]] = []

    def look(name: str, inputs: Tensor, output: Tensor) -> None:
        output.retain_grad()
        met.append((name, inputs.detach(), output))

    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, output, name=name: look(name, args[0], output))
    seen: list[Seen] = []
    for run in passes:
        run(model).backward()
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        for name, inputs, output in met:
            x = inputs.flatten(0, -2)
            if getattr(layers[name], "bias", None) is not None:
                x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
            assert output.grad is not None
            rows[name] = x, output.grad.flatten(0, -2)
        met.clear()
        seen.append(rows)
    return seen, {name: gradient_of(layer) for name, layer in layers.items()}


def gradient_of(layer: nn.Module) -> Tensor:
    """The gradient of [W, b], a copy, [dim_g, dim_a]."""
    gradient = layer.weight.grad.clone()
    gradient = gradient.T if hasattr(layer, "nf") else gradient
    if getattr(layer, "bias", None) is not None:
        gradient = torch.cat([gradient, layer.bias.grad[:, None]], 1)
    return gradient


class Oracle:
    """One K-FAC, dense. `split` damps each factor on its own; `anchor` is the definition of kfac-pytorch.

    `late` has, by layer, how many updates it is refreshed behind the multiples of `inv_steps`.
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
        anchor: bool = False,
        late: Mapping[str, int] | None = None,
    ) -> None:
        self.damping, self.decay, self.power, self.split, self.anchor = damping, decay, power, split, anchor
        self.factor_steps, self.inv_steps = factor_steps, inv_steps
        self.late = late or {}
        self.updates = self.captures = 0
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.used: dict[str, tuple[Tensor, Tensor]] = {}

    def directions(self, seen: Sequence[Seen], gradients: Mapping[str, Tensor], num_tokens: int) -> dict[str, Tensor]:
        """The next update's; `seen` has the gradients of the mean loss."""
        update, self.updates = self.updates, self.updates + 1
        if update % self.factor_steps == 0:
            self.captures += 1
            for name in gradients:
                self._average(name, seen, num_tokens)
        early = not self.anchor and update < self.inv_steps and update in (1, 2, 4, 8, 16, 32)
        for name, factors in self.factors.items():
            late = 0 if update < self.inv_steps else self.late.get(name, 0)
            if update % self.inv_steps == late or early:
                self.used[name] = factors
        return {name: self._solve(*self.used[name], gradient) for name, gradient in gradients.items()}

    def _average(self, name: str, seen: Sequence[Seen], num_tokens: int) -> None:
        if self.anchor:
            a = sum(x.T @ x / len(x) for x, _ in (rows[name] for rows in seen)) / len(seen)
            g = sum(d.T @ d / len(d) for _, d in (rows[name] for rows in seen)) / len(seen)
            start = torch.eye(len(a), dtype=a.dtype), torch.eye(len(g), dtype=g.dtype)
            weight = self.decay
        else:
            x, d = (torch.cat([rows[name][side] for rows in seen]) for side in (0, 1))
            a, g = x.T @ x / len(x), num_tokens * d.T @ d
            start = a, g
            weight = min(self.decay, 1 - 1 / self.captures)
        old = self.factors.get(name, start)
        self.factors[name] = weight * old[0] + (1 - weight) * a, weight * old[1] + (1 - weight) * g

    def _solve(self, a: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
        eye_a, eye_g = torch.eye(len(a), dtype=a.dtype), torch.eye(len(g), dtype=g.dtype)
        mean_a, mean_g = a.trace() / len(a), g.trace() / len(g)
        if self.split:
            added = (self.damping, self.damping) if self.anchor else (self.damping**0.5 * m for m in (mean_a, mean_g))
            add_a, add_g = added
            curvature = torch.kron(g + add_g * eye_g, a + add_a * eye_a)
        else:
            added = self.damping if self.anchor else self.damping * mean_a * mean_g
            curvature = torch.kron(g, a) + added * torch.kron(eye_g, eye_a)
        if self.power == 1:
            return torch.linalg.solve(curvature, gradient.flatten()).view_as(gradient)
        values, vectors = torch.linalg.eigh(curvature)
        return (vectors @ ((vectors.T @ gradient.flatten()) / values**self.power)).view_as(gradient)
