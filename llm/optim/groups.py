"""Which parameters decay (matrices, and nothing else), and which matrices are Muon's."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

Groups = list[dict[str, Any]]
"""Parameter groups as a torch optimizer takes them."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters: one group with weight decay, one without; no group is empty.

    Weights of two or more dimensions decay (Linear, Conv1D, Embedding, a mixture's stacked
    experts); biases, every kind of norm, single vectors, the logarithms of a state space's decay
    (Mamba's A_log), and what a model marks with `_no_weight_decay` do not. A tied weight stands
    once, under its first name; frozen ones are left out.

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


def hidden_matrices(model: nn.Module) -> dict[str, bool]:
    """The weights that Muon is for: those of Linear and Conv1D inside the model's blocks.

    Blocks are what stands in a list of modules. Embeddings, whatever shares a weight with one, the head, norms and a
    mixture's stacked experts are not among them.

    Returns:
        By name, in the model's order: whether the weight is stored [inputs, outputs], as Conv1D's is.
    """
    modules = dict(model.named_modules())
    lists = {name for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    tables = {id(weight) for m in modules.values() if isinstance(m, nn.Embedding) for weight in m.parameters()}
    found = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        in_a_block = any(owner.startswith(f"{name_of_list}.") for name_of_list in lists)
        is_linear = isinstance(modules[owner], nn.Linear | Conv1D) and leaf == "weight"
        if in_a_block and is_linear and id(parameter) not in tables:
            found[name] = isinstance(modules[owner], Conv1D)
    return found


def muon_groups(model: nn.Module, weight_decay: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups of `parameter_groups`, cut into those of hidden matrices and those of everything else.

    Returns:
        Muon's groups, with `inputs_first`, and the others; none is empty, either list may be.
    """
    hidden = hidden_matrices(model)
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in parameter_groups(model, weight_decay):
        for inputs_first in (False, True):
            chosen = [(name, weight) for name, weight in group["params"] if hidden.get(name) is inputs_first]
            matrices.append({**group, "params": chosen, "inputs_first": inputs_first})
        others.append({**group, "params": [(name, one) for name, one in group["params"] if name not in hidden]})
    return [group for group in matrices if group["params"]], [group for group in others if group["params"]]


def _is_matrix(owner: nn.Module, leaf: str, parameter: nn.Parameter) -> bool:
    # transformers does not mark A_log in a model that is new.
    if parameter.ndim < 2 or leaf.endswith(("bias", "A_log")) or "norm" in type(owner).__name__.lower():
        return False
    return not getattr(parameter, "_no_weight_decay", False)
