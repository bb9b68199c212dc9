"""Test the model that a run starts with, where the caller built it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Model

from llm.config.errors import UserError
from llm.config.options import ModelOptions
from llm.distributed.world import World
from llm.training.checkpoints.resume import Start
from llm.training.initial_model import GivenModel

FRESH = Start(None, 0, ModelOptions(dropout=0.25))
WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def test_build_when_fresh_then_is_a_copy_with_the_options_dropout(tiny_gpt2: Any, byte_tokenizer: Any) -> None:
    given = GivenModel(tiny_gpt2.bfloat16())
    config = given.load_config(FRESH, byte_tokenizer)
    model = given.build(FRESH, config, byte_tokenizer)
    assert model.config.resid_pdrop == 0.25
    assert tiny_gpt2.config.resid_pdrop == 0.0
    assert model.training
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tiny_gpt2.state_dict()[name].float())
        assert tensor.data_ptr() != tiny_gpt2.state_dict()[name].data_ptr()


def test_build_when_special_ids_lie_beyond_the_tokenizer_then_its_own_are_taken(
    tiny_gpt2: Any, byte_tokenizer: Any
) -> None:
    tiny_gpt2.config.eos_token_id = tiny_gpt2.generation_config.eos_token_id = 50256
    given = GivenModel(tiny_gpt2)
    model = given.build(FRESH, given.load_config(FRESH, byte_tokenizer), byte_tokenizer)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 256
    assert tiny_gpt2.config.eos_token_id == 50256


def test_load_config_when_embeddings_are_padded_then_they_stay(tiny_gpt2: Any, byte_tokenizer: Any) -> None:
    tiny_gpt2.resize_token_embeddings(320)
    given = GivenModel(tiny_gpt2)
    config = given.load_config(FRESH, byte_tokenizer)
    assert given.build(FRESH, config, byte_tokenizer).get_input_embeddings().weight.shape == (320, 32)


@pytest.mark.parametrize("num_rows", [256, 1000])
def test_load_config_when_the_vocabulary_is_another_then_is_refused(
    num_rows: int, tiny_gpt2: Any, byte_tokenizer: Any
) -> None:
    tiny_gpt2.resize_token_embeddings(num_rows)
    with pytest.raises(UserError, match=f"the given model has {num_rows} tokens, the tokenizer has 257"):
        GivenModel(tiny_gpt2).load_config(FRESH, byte_tokenizer)


def test_receive_when_weights_come_under_their_first_names_then_tied_ones_are_set_too(tiny_gpt2: Any) -> None:
    weights = [
        (name, torch.full_like(tensor, 2.0))
        for name, tensor in tiny_gpt2.state_dict().items()
        if name != "lm_head.weight"
    ]
    parameters = dict(tiny_gpt2.named_parameters())
    updater: Any = SimpleNamespace(full_weights=lambda: iter(weights))
    GivenModel(tiny_gpt2).receive(updater, WORLD)
    assert all((tensor == 2.0).all() for tensor in tiny_gpt2.state_dict().values())
    assert all(parameter is parameters[name] for name, parameter in tiny_gpt2.named_parameters())


def test_model_when_it_has_no_language_modelling_head_then_is_refused(tiny_gpt2: Any) -> None:
    with pytest.raises(UserError, match="is a GPT2Model, but AutoModelForCausalLM would load it as GPT2LMHeadModel"):
        GivenModel(GPT2Model(tiny_gpt2.config))


def test_model_when_its_layers_are_not_those_of_its_configuration_then_is_refused(tiny_gpt2: Any) -> None:
    del tiny_gpt2.transformer.h[1]
    with pytest.raises(UserError, match=r"\(transformer\.h\.1\.attn\.c_attn\.bias, 12 in all\)"):
        GivenModel(tiny_gpt2)


def test_model_when_its_output_layer_was_untied_then_is_refused(tiny_gpt2: Any) -> None:
    tiny_gpt2.lm_head.weight = torch.nn.Parameter(tiny_gpt2.lm_head.weight.detach().clone())
    with pytest.raises(UserError, match=r"lm_head\.weight, 1 in all"):
        GivenModel(tiny_gpt2)
