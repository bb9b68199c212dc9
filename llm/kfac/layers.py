"""Selection of the layers that K-FAC preconditions, and one view of Linear and Conv1D."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """A linear layer y = W x + b, in either layout of its weight.

    Attributes:
        name: of the module in the model.
        module: nn.Linear, or HuggingFace's Conv1D.
        num_in: length of x.
        num_out: length of y.
        has_bias: whether there is a bias that is trained.
        transposed: whether the weight is stored as [num_in, num_out], as in Conv1D.
    """

    name: str
    module: nn.Module
    num_in: int
    num_out: int
    has_bias: bool
    transposed: bool

    @property
    def dim_a(self) -> int:
        """Rows of the factor A: the inputs and, with a bias, the constant 1."""
        return self.num_in + 1 if self.has_bias else self.num_in

    @property
    def dim_g(self) -> int:
        """Rows of the factor G: the gradients of the outputs."""
        return self.num_out

    @property
    def weight(self) -> nn.Parameter:
        """The weight as the module stores it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def read_gradient(self, out: Tensor) -> None:
        """Write the gradient of [W, b]^T into `out`; zeros for a parameter without a gradient.

        Args:
            out: [dim_a, dim_g] of any floating point dtype.
        """
        for parameter, part in self._parts(out):
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad)

    def write_gradient(self, gradient: Tensor) -> None:
        """Replace the gradient of [W, b]^T; a parameter without a gradient keeps none.

        Args:
            gradient: [dim_a, dim_g] of any floating point dtype.
        """
        for parameter, part in self._parts(gradient):
            if parameter.grad is not None:
                parameter.grad.copy_(part)

    def _parts(self, gradient: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Return each parameter with the view of [dim_a, dim_g] that belongs to it, in the parameter's own layout."""
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
    """Return the layers to precondition, and why every other module with weights of its own is skipped.

    Args:
        model: searched in the order of `named_modules`.
        skip: regular expressions; a layer is skipped if one matches a part of its name or of its class's name. None:
            none is skipped by name.
        max_factor_dim: largest number of rows of a factor; a layer with a larger factor is skipped.

    Returns:
        The layers, and name -> reason of the skipped modules.

    Raises:
        ValueError: FSDP wraps the model, or no layer is left (the message names the reasons).
    """
    patterns = [skip] if isinstance(skip, str) else list(skip or ())
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("K-FAC needs whole weights, which FSDP shards; use DistributedDataParallel")
    users = _users(model)
    layers = []
    skipped = {}
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        reason = _skip_reason(name, module, users, patterns)
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


def _skip_reason(name: str, module: nn.Module, users: dict[int, list[str]], patterns: list[str]) -> str | None:
    """Return why this module is left to the optimizer, apart from its size; None if it is preconditioned."""
    kind = type(module).__name__
    if not isinstance(module, nn.Linear) and not _is_conv1d(module):
        return f"{kind} is not a linear layer"
    weight = module.weight
    if hasattr(weight, "device_mesh"):
        return "its weight is sharded (FSDP2, or tensor parallel)"
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not weight.is_floating_point():
        return "its weight is not a matrix of floating point numbers"
    if not weight.requires_grad:
        return "its weight is frozen"
    others = [user for user in users[id(weight)] if user != name]
    if others:
        return f"its weight is shared with {others[0]}"
    for pattern in patterns:
        if re.search(pattern, name) or re.search(pattern, kind):
            return f"skip_layers matches it ({pattern})"
    if kind == "NonDynamicallyQuantizableLinear":
        return "its weight is used without a call of the module"
    return None


def _layer(name: str, module: nn.Module) -> Layer:
    weight = module.weight
    bias = getattr(module, "bias", None)
    assert isinstance(weight, nn.Parameter)
    transposed = _is_conv1d(module)
    num_out, num_in = reversed(weight.shape) if transposed else weight.shape
    has_bias = isinstance(bias, nn.Parameter) and bias.requires_grad
    return Layer(name, module, num_in, num_out, has_bias, transposed)


def _is_conv1d(module: nn.Module) -> bool:
    """Return whether this is HuggingFace's Conv1D, recognized by name because transformers may not be installed."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).__mro__
    )


def _users(model: nn.Module) -> dict[int, list[str]]:
    """Return `id` of each parameter -> names of the modules that hold it."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    return users


def _summary(skipped: dict[str, str]) -> str:
    """Return every reason once, with the first module that it holds for and the number of the others."""
    if not skipped:
        return "the model has no weights"
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name or "the model itself")
    return "; ".join(
        f"{modules[0]}{f' and {len(modules) - 1} more' if modules[1:] else ''}: {reason}"
        for reason, modules in names.items()
    )


def device_of(layers: Sequence[Layer]) -> torch.device:
    """Return the device that the layers are on.

    Raises:
        ValueError: the layers are on several devices.
    """
    devices = {layer.weight.device for layer in layers}
    if len(devices) > 1:
        raise ValueError(f"K-FAC needs all its layers on one device, not on {', '.join(sorted(map(str, devices)))}")
    return devices.pop()
