"""Test the names of weights that share one tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llm.models.tied_weights import first_names, with_tied_names


class Model(nn.Module):
    """An embedding whose weight is also that of the output layer, and a layer of its own."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3, bias=False)
        self.lm_head = nn.Linear(3, 5, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight


def test_first_names_when_weights_are_tied_then_both_names_map_to_the_first() -> None:
    assert first_names(Model(tied=True)) == {
        "embedding.weight": "embedding.weight",
        "norm.weight": "norm.weight",
        "lm_head.weight": "embedding.weight",
    }


def test_first_names_when_no_weights_are_tied_then_names_map_to_themselves() -> None:
    names = ["embedding.weight", "norm.weight", "lm_head.weight"]

    assert first_names(Model(tied=False)) == dict(zip(names, names, strict=True))


def test_with_tied_names_when_each_tensor_has_its_first_name_then_the_model_loads_the_result() -> None:
    model = Model(tied=True)
    embedding = torch.arange(15.0).view(5, 3)

    weights = with_tied_names(model, {"norm.weight": torch.full((3,), 2.0), "embedding.weight": embedding})

    assert list(weights) == list(model.state_dict())
    assert weights["lm_head.weight"] is embedding
    model.load_state_dict(weights, strict=True)
    assert torch.equal(model.lm_head.weight, embedding)


def test_with_tied_names_when_a_tensor_is_missing_then_it_is_refused() -> None:
    with pytest.raises(KeyError, match=r"norm\.weight"):
        with_tied_names(Model(tied=True), {"embedding.weight": torch.zeros(5, 3)})
