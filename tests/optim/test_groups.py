"""Which parameters decay, and which matrices Muon updates."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from llm.models.language_model import LanguageModel
from llm.optim.groups import hidden_matrices, muon_groups, parameter_groups


def _names(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the parameters with and without weight decay."""
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    return {name for name, _ in decayed["params"]}, {name for name, _ in others["params"]}


def test_groups_when_gpt2_then_only_matrices_decay(tiny_gpt2: PreTrainedModel) -> None:
    decayed, others = _names(tiny_gpt2)
    block = {f"transformer.h.{i}." for i in range(2)}
    matrices = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    embeddings = {"transformer.wte.weight", "transformer.wpe.weight"}
    assert decayed == {prefix + name for prefix in block for name in matrices} | embeddings
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


def test_groups_when_a_parameter_is_frozen_or_marked_then_it_is_left_out_or_does_not_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    model[1].weight._no_weight_decay = True
    (group,) = parameter_groups(model, 0.1)
    assert group["weight_decay"] == 0.0
    assert [name for name, _ in group["params"]] == ["1.weight", "1.bias"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_groups_when_weights_are_tied_then_they_are_listed_once(wrapped: bool, tiny_gpt2: PreTrainedModel) -> None:
    model = LanguageModel(tiny_gpt2) if wrapped else tiny_gpt2
    groups = parameter_groups(model, 0.1)
    tensors = [id(tensor) for group in groups for _, tensor in group["params"]]
    assert len(tensors) == len(set(tensors))
    optimizer = torch.optim.AdamW(groups)
    assert len(optimizer.param_groups[0]["param_names"]) == len(groups[0]["params"])


def test_groups_when_mamba_then_the_logarithm_of_its_decay_does_not_decay() -> None:
    config = MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, state_size=4)
    decayed, others = _names(MambaForCausalLM(config))
    assert "backbone.layers.0.mixer.A_log" in others and "backbone.layers.0.mixer.in_proj.weight" in decayed


def test_muon_groups_when_gpt2_then_muon_has_only_the_matrices_of_the_blocks(tiny_gpt2: PreTrainedModel) -> None:
    matrices, others = muon_groups(tiny_gpt2, 0.1)
    parts = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    (group,) = matrices
    assert {name for name, _ in group["params"]} == {f"transformer.h.{i}.{part}" for i in range(2) for part in parts}
    assert (group["inputs_first"], group["weight_decay"]) == (True, 0.1)
    embeddings = {"transformer.wte.weight", "transformer.wpe.weight"}
    assert [group["weight_decay"] for group in others] == [0.1, 0.0]
    assert {name for name, _ in others[0]["params"]} == embeddings
    assert sum(len(group["params"]) for group in (*matrices, *others)) == len(dict(tiny_gpt2.named_parameters()))


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_matrices_when_llama_then_embedding_and_output_layer_are_not_included(tied: bool) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    hidden = hidden_matrices(AutoModelForCausalLM.from_config(config))
    assert {name.split(".")[-2] for name in hidden} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }
    assert not any(hidden.values())


def test_hidden_matrices_when_a_block_is_tied_to_an_embedding_then_its_weight_is_not_included() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(4, 6, bias=False), nn.Linear(4, 4)])
    model.embedding = nn.Embedding(6, 4)
    model.embedding.weight = model.blocks[0].weight
    assert list(hidden_matrices(model)) == ["blocks.1.weight"]
