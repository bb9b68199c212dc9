"""Which layers a preconditioner takes, which it leaves and why; one view of all that it takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """A linear layer y = W x + b, however its weight is laid out.

    Attributes:
        name: the module's, in the model.
        module: nn.Linear, or HuggingFace's Conv1D.
        num_in: numbers in x.
        num_out: numbers in y.
        has_bias: whether there is a bias that is trained.
        transposed: the weight is stored as [num_in, num_out].
    """

    name: str
    module: nn.Module
    num_in: int
    num_out: int
    has_bias: bool
    transposed: bool

    @property
    def dim_a(self) -> int:
        """Rows of the factor of the inputs: those and, with a bias, the constant 1."""
        return self.num_in + self.has_bias

    @property
    def dim_g(self) -> int:
        """Rows of the factor of the outputs' gradients."""
        return self.num_out

    @property
    def weight(self) -> nn.Parameter:
        """The weight as the module holds it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def read_gradient(self, out: Tensor) -> None:
        """Writes the gradient of [W, b]^T into [dim_a, dim_g]; zeros for what has none."""
        for parameter, part in self._parts(out):
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad)

    def write_gradient(self, gradient: Tensor) -> None:
        """Takes [dim_a, dim_g] as the gradient of [W, b]^T; what had none still has none."""
        for parameter, part in self._parts(gradient):
            if parameter.grad is not None:
                parameter.grad.copy_(part)

    def _parts(self, gradient: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        weight = gradient[: self.num_in]
        parts = [(self.weight, weight if self.transposed else weight.t())]
        if self.has_bias:
            bias = self.module.bias
            assert isinstance(bias, nn.Parameter)
            parts.append((bias, gradient[-1]))
        return parts


def find_layers(
    model: nn.Module, skip: Sequence[str] | None, max_factor_dim: int
) -> tuple[list[Layer], dict[str, str]]:
    """The layers to precondition, and for every other module with weights of its own the reason why not.

    Args:
        model: its modules are looked at by name, in their order.
        skip: regular expressions; a layer is left out where one is found in its name or its class's name.
        max_factor_dim: the largest factor's rows.

    Returns:
        The layers, and name -> reason.

    Raises:
        ValueError: there is no layer to take; the message names why.
    """
    patterns = [skip] if isinstance(skip, str) else list(skip or ())
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("K-FAC wants whole weights, which FSDP shards; use DistributedDataParallel")
    users = _users(model)
    layers, skipped = [], {}
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        reason = _refusal(name, module, users, patterns)
        if reason is None:
            layer = _layer(name, module)
            largest = max(layer.dim_a, layer.dim_g)
            if largest <= max_factor_dim:
                layers.append(layer)
                continue
            reason = f"a factor of {largest} rows is above max_factor_dim = {max_factor_dim}"
        skipped[name] = reason
    if not layers:
        raise ValueError(f"K-FAC has no layer to precondition: {_summary(skipped)}")
    return layers, skipped


def _refusal(name: str, module: nn.Module, users: dict[int, list[str]], patterns: list[str]) -> str | None:
    """Why this module is left to the optimizer, whatever its size; None when it is not."""
    kind = type(module).__name__
    if not isinstance(module, nn.Linear) and not _is_conv1d(module):
        return f"{kind} is no linear layer"
    weight = module.weight
    if hasattr(weight, "device_mesh"):
        return "its weight is sharded (FSDP2, or tensor parallel)"
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not weight.is_floating_point():
        return "its weight is no matrix of floating point numbers"
    if not weight.requires_grad:
        return "its weight is frozen"
    others = [user for user in users[id(weight)] if user != name]
    if others:
        return f"its weight is shared with {others[0]}"
    for pattern in patterns:
        if re.search(pattern, name) or re.search(pattern, kind):
            return f"skip_layers names it ({pattern})"
    if kind == "NonDynamicallyQuantizableLinear":
        return "its weight is used without calling it"
    return None


def _layer(name: str, module: nn.Module) -> Layer:
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, nn.Parameter)
    transposed = _is_conv1d(module)
    num_out, num_in = reversed(weight.shape) if transposed else weight.shape
    has_bias = isinstance(bias, nn.Parameter) and bias.requires_grad
    return Layer(name, module, num_in, num_out, has_bias, transposed)


def _is_conv1d(module: nn.Module) -> bool:
    """HuggingFace's linear layer with a transposed weight, known by name: transformers need not be installed."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).__mro__
    )


def _users(model: nn.Module) -> dict[int, list[str]]:
    """The modules that hold each parameter, by its identity."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    return users


def _summary(skipped: dict[str, str]) -> str:
    """Every reason once, with the first module that it holds for and the number of the others."""
    if not skipped:
        return "the model has no weights"
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name or "the model itself")
    return "; ".join(
        f"{held[0]}{f' and {len(held) - 1} more' if held[1:] else ''}: {reason}" for reason, held in names.items()
    )


def device_of(layers: Sequence[Layer]) -> torch.device:
    """Where the layers are.

    Raises:
        ValueError: not all on one device.
    """
    devices = {layer.weight.device for layer in layers}
    if len(devices) > 1:
        raise ValueError(f"K-FAC wants all its layers on one device, not on {', '.join(sorted(map(str, devices)))}")
    return devices.pop()
