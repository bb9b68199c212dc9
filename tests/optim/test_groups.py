"""What decays and what does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from llm.models.language_model import LanguageModel
from llm.optim.groups import parameter_groups


def _names(model: nn.Module) -> tuple[set[str], set[str]]:
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    return {name for name, _ in decayed["params"]}, {name for name, _ in others["params"]}


def test_groups_when_gpt2_then_matrices_decay_alone(tiny_gpt2: PreTrainedModel) -> None:
    decayed, others = _names(tiny_gpt2)
    block = {f"transformer.h.{i}." for i in range(2)}
    matrices = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    tables = {"transformer.wte.weight", "transformer.wpe.weight"}
    assert decayed == {prefix + name for prefix in block for name in matrices} | tables
    assert all(name.endswith("bias") or ".ln_" in name for name in others)
    assert len(decayed) + len(others) == len(dict(tiny_gpt2.named_parameters()))


def test_groups_when_llama_then_no_norm_decays() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    _, others = _names(AutoModelForCausalLM.from_config(config))
    assert others == {
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }


def test_groups_when_norm_has_a_matrix_then_it_does_not_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm([4, 4]))
    assert _names(model) == ({"0.weight"}, {"0.bias", "1.weight", "1.bias"})


def test_groups_when_frozen_or_marked_then_left_out_or_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    model[1].weight._no_weight_decay = True
    (group,) = parameter_groups(model, 0.1)
    assert group["weight_decay"] == 0.0
    assert [name for name, _ in group["params"]] == ["1.weight", "1.bias"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_groups_when_tied_then_counts_once(wrapped: bool, tiny_gpt2: PreTrainedModel) -> None:
    model = LanguageModel(tiny_gpt2) if wrapped else tiny_gpt2
    groups = parameter_groups(model, 0.1)
    tensors = [id(tensor) for group in groups for _, tensor in group["params"]]
    assert len(tensors) == len(set(tensors))
    optimizer = torch.optim.AdamW(groups)
    assert len(optimizer.param_groups[0]["param_names"]) == len(groups[0]["params"])


def test_groups_when_mamba_then_what_is_a_logarithm_does_not_decay() -> None:
    config = MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, state_size=4)
    decayed, others = _names(MambaForCausalLM(config))
    assert "backbone.layers.0.mixer.A_log" in others and "backbone.layers.0.mixer.in_proj.weight" in decayed
