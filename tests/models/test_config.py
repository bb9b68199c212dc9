"""Configurations: read, changed by options, fitted to a tokenizer, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, PreTrainedModel

from llm.config.errors import UsageError, UserError
from llm.config.options import ModelOptions
from llm.models.config import UNLIMITED, context_limit, load_config, read_config
from llm.tokenization.load import character_tokenizer


def _character_tokenizer(size: int):
    return character_tokenizer({chr(0x4E00 + i) for i in range(size - 1)})


def test_overrides_when_parsed_then_have_the_types_of_the_configuration() -> None:
    text = "n_layer=3,scale_attn_weights=false,resid_pdrop=0,activation_function=relu,n_inner=99"
    config = read_config(ModelOptions(config_overrides=text))
    assert (config.n_layer, config.scale_attn_weights, config.resid_pdrop) == (3, False, 0.0)
    assert (config.activation_function, config.n_inner) == ("relu", 99)


def test_overrides_when_list_then_is_read_as_json() -> None:
    text = 'num_layers=2,attention_types=[[["global"],2]],hidden_size=32'
    config = read_config(ModelOptions(model_type="gpt_neo", config_overrides=text))
    assert config.attention_layers == ["global", "global"]
    assert config.hidden_size == 32


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("n_layers=2", r"n_layers: .*gpt2.*; did you mean .*n_layer"),
        ("n_layer=two", r"n_layer=two: expected int, .* 12"),
        ("scale_attn_weights=maybe", "expected bool"),
        ("n_layer", "expected key=value"),
    ],
)
def test_overrides_when_wrong_then_error_is_one_line(text: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        read_config(ModelOptions(config_overrides=text))
    assert "\n" not in str(caught.value)


def test_model_type_when_misspelt_then_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean .*gpt_neo"):
        read_config(ModelOptions(model_type="gptneo"))


def test_model_type_when_not_a_language_model_then_refuses() -> None:
    with pytest.raises(UserError, match="not a causal language model"):
        read_config(ModelOptions(model_type="vit"))


def test_dropout_when_set_then_changes_every_rate() -> None:
    config = read_config(ModelOptions(dropout=0.3))
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.3, 0.3, 0.3)
    neo = read_config(ModelOptions(model_type="gpt_neo", dropout=0.0))
    assert (neo.attention_dropout, neo.resid_dropout, neo.embed_dropout) == (0.0, 0.0, 0.0)


def test_context_limit_when_model_and_tokenizer_have_one_then_is_the_smaller(byte_tokenizer) -> None:
    config = read_config(ModelOptions(config_overrides="n_positions=128"))
    assert context_limit(config) == context_limit(config, byte_tokenizer) == 128
    before = byte_tokenizer.model_max_length
    byte_tokenizer.model_max_length = 100
    try:
        assert context_limit(config, byte_tokenizer) == 100
    finally:
        byte_tokenizer.model_max_length = before


def test_context_limit_when_model_has_none_then_is_unlimited() -> None:
    assert context_limit(read_config(ModelOptions(model_type="mamba"))) == UNLIMITED


def test_load_config_when_tokenizer_has_another_vocabulary_then_refuses_it(
    tiny_gpt2: PreTrainedModel, byte_tokenizer, tmp_path: Path
) -> None:
    tiny_gpt2.resize_token_embeddings(800)
    tiny_gpt2.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"vocabulary mismatch: .* 800 .* 257;"):
        load_config(ModelOptions(model_name_or_path=str(tmp_path)), byte_tokenizer)
    with pytest.raises(UserError, match=r"vocabulary mismatch: .* 800 .* 1500;"):
        load_config(ModelOptions(model_name_or_path=str(tmp_path)), _character_tokenizer(1500))


def test_read_config_when_folder_does_not_exist_then_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_config(ModelOptions(model_name_or_path=str(tmp_path / "nowhere")))


def test_read_config_when_folder_has_no_config_then_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json in this folder"):
        read_config(ModelOptions(model_name_or_path=str(tmp_path)))


def test_read_config_when_file_is_broken_then_error_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(UserError, match=r"config\.json") as caught:
        read_config(ModelOptions(model_name_or_path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_read_config_when_width_is_changed_then_derived_values_follow(tmp_path: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    text = "hidden_size=64,num_attention_heads=4"
    config = read_config(ModelOptions(config_name=str(tmp_path), config_overrides=text))
    assert (config.head_dim, config.num_key_value_heads) == (16, 4)


def test_read_config_when_number_of_layers_is_changed_then_layer_types_follow(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen2", num_hidden_layers=4).save_pretrained(tmp_path)
    for num_layers in (2, 6):
        options = ModelOptions(config_name=str(tmp_path), config_overrides=f"num_hidden_layers={num_layers}")
        assert len(read_config(options).layer_types) == num_layers
