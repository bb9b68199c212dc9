"""Tiny models with random weights, of any architecture."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 131


def build_model(model_type: str, **config: Any) -> PreTrainedModel:
    """Return a model with two layers of width 32, two heads, a context of 64 tokens and `VOCAB_SIZE` tokens."""
    torch.manual_seed(0)
    settings = AutoConfig.for_model(
        model_type, vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, **config,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(settings)
    return model
