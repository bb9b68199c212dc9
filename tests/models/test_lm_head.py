"""The check of the lm_head finds scaling, soft caps and second output layers, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm.models.lm_head import has_linear_lm_head
from tests.models.models import build_model

EXPERTS = {"num_local_experts": 2, "num_key_value_heads": 2, "output_router_logits": True}


@pytest.mark.parametrize(
    ("model_type", "config", "expected"),
    [
        ("gpt2", {}, True),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}, True),
        ("llama", {"tie_word_embeddings": False}, True),
        ("gptj", {"rotary_dim": 8}, True),  # lm_head with a bias
        ("gemma2", {"head_dim": 16, "num_key_value_heads": 2}, False),  # soft cap
        ("cohere", {}, False),  # scale
        ("granite", {"logits_scaling": 8.0}, False),
        ("mixtral", EXPERTS, False),  # load-balancing loss
        ("mixtral", EXPERTS | {"output_router_logits": False}, True),
    ],
)
def test_has_linear_lm_head_when_called_then_matches_the_architecture_and_changes_nothing(
    model_type: str, config: dict[str, Any], expected: bool
) -> None:
    model = build_model(model_type, **config).train()
    state = torch.get_rng_state()
    assert has_linear_lm_head(model) is expected
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.get_output_embeddings()._forward_hooks


@pytest.mark.parametrize("length", [1, 3, 7])
def test_has_linear_lm_head_when_context_is_short_then_true(length: int) -> None:
    assert has_linear_lm_head(build_model("gpt2", n_positions=length))
