"""Which parameters decay: matrices, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters: one group with weight decay, one without; no group is empty.

    Weights of two or more dimensions decay (Linear, Conv1D, Embedding, a mixture's stacked
    experts); biases, every kind of norm, single vectors, and what a model marks with
    `_no_weight_decay` do not. A tied weight stands once, under its first name; frozen ones are
    left out.

    Returns:
        Groups for a torch optimizer, with names: `params` is a list of (name, parameter), which
        torch keeps as `params` and `param_names`.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner_name, _, leaf = name.rpartition(".")
        decays = _is_matrix(owners[owner_name], leaf, parameter)
        (decayed if decays else others).append((name, parameter))
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_matrix(owner: nn.Module, leaf: str, parameter: nn.Parameter) -> bool:
    if parameter.ndim < 2 or leaf.endswith("bias") or "norm" in type(owner).__name__.lower():
        return False
    return not getattr(parameter, "_no_weight_decay", False)
