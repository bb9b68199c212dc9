"""Names of weights that share one tensor, such as those of a tied output layer and the embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def first_names(model: nn.Module) -> dict[str, str]:
    """Map every name in the model's `state_dict` to the first name of the same tensor.

    Args:
        model: with weights of any shape and dtype; a tied output layer shares its tensor with the embeddings.
    """
    by_identity: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    return {name: by_identity.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def with_tied_names(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under all their names, in the order of the model's `state_dict`.

    Args:
        model: knows the names.
        weights: each tensor, of any shape and dtype, at least under its first name.

    Raises:
        KeyError: a tensor of the model is missing.
    """
    return {name: weights[first] for name, first in first_names(model).items()}
