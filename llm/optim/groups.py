"""Parameter groups: which parameters have weight decay, and which matrices Muon updates."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

Groups = list[dict[str, Any]]
"""Parameter groups as a torch optimizer takes them."""


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Return the trained parameters in one group with weight decay and one without; no group is empty.

    Weights of two or more dimensions decay (Linear, Conv1D, Embedding, the stacked experts of a mixture). Biases, norms
    of every kind, single vectors, the logarithms of a state space's decay (Mamba's A_log), and parameters that the
    model marks with `_no_weight_decay` do not. A tied weight is listed once, under its first name; frozen parameters
    are left out.

    Returns:
        Groups for a torch optimizer, with names: `params` is a list of (name, parameter), which torch stores as
        `params` and `param_names`.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner_name, _, leaf = name.rpartition(".")
        decays = _is_decayed(modules[owner_name], leaf, parameter)
        (decayed if decays else others).append((name, parameter))
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> dict[str, bool]:
    """Return the weights that Muon updates: those of Linear and Conv1D inside the model's blocks.

    A block is a member of an nn.ModuleList. Embeddings, weights that are tied to an embedding, the output layer, norms
    and the stacked experts of a mixture are not included.

    Returns:
        Name of the weight -> whether it is stored as [inputs, outputs], as in Conv1D; in the model's order.
    """
    modules = dict(model.named_modules())
    lists = {name for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    embeddings = {id(weight) for m in modules.values() if isinstance(m, nn.Embedding) for weight in m.parameters()}
    matrices = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        is_in_block = any(owner.startswith(f"{name_of_list}.") for name_of_list in lists)
        is_linear = isinstance(modules[owner], nn.Linear | Conv1D) and leaf == "weight"
        if is_in_block and is_linear and id(parameter) not in embeddings:
            matrices[name] = isinstance(modules[owner], Conv1D)
    return matrices


def muon_groups(model: nn.Module, weight_decay: float) -> tuple[Groups, Groups]:
    """Split each of the `parameter_groups` into hidden matrices and other parameters.

    Args:
        model: its trained parameters are split.
        weight_decay: decay of the groups that `parameter_groups` gives weight decay.

    Returns:
        Groups of hidden matrices, for Muon, with the key `inputs_first` (whether the matrices are stored
        [inputs, outputs], as in Conv1D); and groups of the other parameters. No group is empty; either list may be
        empty.
    """
    hidden = hidden_matrices(model)
    matrices: Groups = []
    others: Groups = []
    for group in parameter_groups(model, weight_decay):
        for inputs_first in (False, True):
            selected = [(name, weight) for name, weight in group["params"] if hidden.get(name) is inputs_first]
            matrices.append({**group, "params": selected, "inputs_first": inputs_first})
        others.append({**group, "params": [(name, weight) for name, weight in group["params"] if name not in hidden]})
    return [group for group in matrices if group["params"]], [group for group in others if group["params"]]


def _is_decayed(owner: nn.Module, leaf: str, parameter: nn.Parameter) -> bool:
    # transformers does not mark A_log in a model with new weights.
    if parameter.ndim < 2 or leaf.endswith(("bias", "A_log")) or "norm" in type(owner).__name__.lower():
        return False
    return not getattr(parameter, "_no_weight_decay", False)
