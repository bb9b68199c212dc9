"""Models: built from scratch, loaded with weights, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm.config.errors import UsageError, UserError
from llm.config.options import ModelOptions
from llm.models.build import build_model, context_limit, load_config, read_config
from llm.models.config import UNLIMITED
from llm.tokenization.load import character_tokenizer

SMALL = "n_layer=1,n_embd=32,n_head=2,n_positions=64"


def _built(tokenizer, **options: object) -> tuple[PreTrainedModel, str]:
    table = ModelOptions.model_validate(options)
    return build_model(table, load_config(table, tokenizer), tokenizer)


def _foreign(size: int):
    return character_tokenizer({chr(0x4E00 + i) for i in range(size - 1)})


def test_scratch_when_nothing_named_then_is_a_gpt2_of_the_tokenizers_length(byte_tokenizer) -> None:
    model, origin = _built(byte_tokenizer, config_overrides=SMALL)
    assert origin == "random"
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.config.vocab_size == len(byte_tokenizer) == model.lm_head.weight.shape[0]
    assert model.config.eos_token_id == 256
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.training


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("gpt_neo", "num_layers=3,hidden_size=32,num_heads=2"),
        ("llama", "num_hidden_layers=1,hidden_size=32,intermediate_size=64,num_attention_heads=2"),
        ("gpt_neox", "num_hidden_layers=1,hidden_size=32,num_attention_heads=2"),
        ("bert", "num_hidden_layers=1,hidden_size=32,num_attention_heads=2"),
    ],
)
def test_scratch_when_other_type_then_reloads_and_never_sees_the_future(
    model_type: str, overrides: str, byte_tokenizer, tmp_path: Path
) -> None:
    model, _ = _built(byte_tokenizer, model_type=model_type, config_overrides=overrides)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(8).unsqueeze(0)
    changed = ids.clone()
    changed[0, -1] = 99
    with torch.no_grad():
        first, second = reloaded(ids).logits, reloaded(changed).logits
        assert torch.equal(first, model.eval()(ids).logits)
    assert torch.allclose(first[:, :-1], second[:, :-1], atol=1e-6)


def test_scratch_when_seeded_alike_then_weights_are_equal(byte_tokenizer) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(_built(byte_tokenizer, config_overrides=SMALL)[0].state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_overrides_when_typed_then_take_the_configurations_types() -> None:
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
        ("n_layers=2", r"n_layers: not in the configuration of gpt2; did you mean .*n_layer"),
        ("n_layer=two", r"n_layer=two: expected int, as the present 12"),
        ("scale_attn_weights=maybe", "expected bool"),
        ("n_layer", "expected key=value"),
    ],
)
def test_overrides_when_wrong_then_one_line_says_why(text: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        read_config(ModelOptions(config_overrides=text))
    assert "\n" not in str(caught.value)


def test_overrides_when_model_cannot_be_built_then_one_line_says_why(byte_tokenizer) -> None:
    with pytest.raises(UsageError, match="config_overrides"):
        _built(byte_tokenizer, config_overrides="n_embd=33,n_head=2,n_layer=1")


def test_model_type_when_misspelt_then_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean .*gpt_neo"):
        read_config(ModelOptions(model_type="gptneo"))


def test_model_type_when_not_a_language_model_then_refuses() -> None:
    with pytest.raises(UserError, match="not a causal language model"):
        read_config(ModelOptions(model_type="vit"))


def test_dropout_when_set_then_every_rate_of_the_model_has_it() -> None:
    config = read_config(ModelOptions(dropout=0.3))
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.3, 0.3, 0.3)
    neo = read_config(ModelOptions(model_type="gpt_neo", dropout=0.0))
    assert (neo.attention_dropout, neo.resid_dropout, neo.embed_dropout) == (0.0, 0.0, 0.0)


def test_dropout_when_weights_are_loaded_then_holds_too(byte_tokenizer, tiny_gpt2_dir) -> None:
    model, _ = _built(byte_tokenizer, model_name_or_path=str(tiny_gpt2_dir), dropout=0.25)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_context_limit_when_both_have_one_then_is_the_smaller(byte_tokenizer) -> None:
    config = read_config(ModelOptions(config_overrides="n_positions=128"))
    assert context_limit(config) == context_limit(config, byte_tokenizer) == 128
    byte_tokenizer.model_max_length, before = 100, byte_tokenizer.model_max_length
    try:
        assert context_limit(config, byte_tokenizer) == 100
    finally:
        byte_tokenizer.model_max_length = before


def test_context_limit_when_there_is_none_then_is_unlimited() -> None:
    assert context_limit(read_config(ModelOptions(model_type="mamba"))) == UNLIMITED


def test_load_when_half_precision_on_disk_then_is_float32(
    byte_tokenizer, tiny_gpt2: PreTrainedModel, tmp_path: Path
) -> None:
    tiny_gpt2.half().save_pretrained(tmp_path)
    model, origin = _built(byte_tokenizer, model_name_or_path=str(tmp_path))
    assert origin == f"loaded from {tmp_path}"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, tiny_gpt2.lm_head.weight.float())


def test_load_when_table_is_padded_then_drops_rows_and_says_so(
    tiny_gpt2: PreTrainedModel, byte_tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tiny_gpt2.resize_token_embeddings(320)
    tiny_gpt2.save_pretrained(tmp_path)
    model, _ = _built(byte_tokenizer, model_name_or_path=str(tmp_path))
    assert model.config.vocab_size == 257 == model.lm_head.weight.shape[0]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "320 rows became 257" in caplog.text


def test_load_when_tokenizer_is_foreign_then_refuses_the_vocabulary(
    tiny_gpt2: PreTrainedModel, byte_tokenizer, tmp_path: Path
) -> None:
    tiny_gpt2.resize_token_embeddings(800)
    tiny_gpt2.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"vocabulary mismatch: .* 800 tokens, .* has 257;"):
        load_config(ModelOptions(model_name_or_path=str(tmp_path)), byte_tokenizer)
    with pytest.raises(UserError, match=r"vocabulary mismatch: .* 800 tokens, .* has 1500;"):
        load_config(ModelOptions(model_name_or_path=str(tmp_path)), _foreign(1500))


def _copy_with(model: PreTrainedModel, folder: Path, change: str) -> str:
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    if change == "missing":
        del weights["transformer.h.1.mlp.c_fc.weight"]
    if change == "mismatched":
        weights["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(3, 3)
    if change == "unused":
        weights["something.weight"] = torch.zeros(3, 3)
    if change == "absent":
        file.unlink()
        return str(folder)
    save_file(weights, file, metadata={"format": "pt"})
    if change == "damaged":
        file.write_bytes(file.read_bytes()[:5000])
    return str(folder)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ("missing", r"model needs are not there: transformer\.h\.1\.mlp\.c_fc\.weight"),
        ("mismatched", r"other shapes .*transformer\.h\.1\.mlp\.c_fc\.weight"),
        ("damaged", r"model\.safetensors is damaged"),
        ("absent", r"no weights in this folder"),
    ],
)
def test_load_when_weights_are_bad_then_one_line_says_why(
    change: str, cause: str, tiny_gpt2: PreTrainedModel, byte_tokenizer, tmp_path: Path, capfd
) -> None:
    folder = _copy_with(tiny_gpt2, tmp_path, change)
    capfd.readouterr()
    with pytest.raises(UserError, match=cause) as caught:
        _built(byte_tokenizer, model_name_or_path=folder)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_load_when_weights_are_left_over_then_says_which(
    tiny_gpt2: PreTrainedModel, byte_tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _built(byte_tokenizer, model_name_or_path=_copy_with(tiny_gpt2, tmp_path, "unused"))
    assert "something.weight" in caplog.text


def test_load_when_folder_does_not_exist_then_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_config(ModelOptions(model_name_or_path=str(tmp_path / "nowhere")))


def test_load_when_folder_has_no_config_then_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json in this folder"):
        read_config(ModelOptions(model_name_or_path=str(tmp_path)))


def test_load_when_config_is_broken_then_one_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(UserError, match=r"config\.json") as caught:
        read_config(ModelOptions(model_name_or_path=str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loaded", [False, True])
def test_attention_when_unknown_then_one_line_says_so(loaded: bool, byte_tokenizer, tiny_gpt2_dir: Path) -> None:
    source = {"model_name_or_path": str(tiny_gpt2_dir)} if loaded else {"config_overrides": SMALL}
    with pytest.raises(UserError, match="--attn_implementation fast: ") as caught:
        _built(byte_tokenizer, attn_implementation="fast", **source)
    assert "\n" not in str(caught.value)


def test_attention_when_eager_then_model_uses_it(byte_tokenizer) -> None:
    model, _ = _built(byte_tokenizer, config_overrides=SMALL, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_gradient_checkpointing_when_on_then_gradients_are_the_same(byte_tokenizer) -> None:
    ids = torch.arange(16).unsqueeze(0)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, _ = _built(
            byte_tokenizer,
            config_overrides=SMALL,
            dropout=0.0,
            gradient_checkpointing=checkpointing,
        )
        assert model.transformer.h[0].gradient_checkpointing == checkpointing
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
        gradients.append(model.transformer.h[0].mlp.c_fc.weight.grad)
    assert torch.allclose(gradients[0], gradients[1])


def test_config_name_when_width_is_changed_then_heads_follow(tmp_path: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    text = "hidden_size=64,num_attention_heads=4"
    config = read_config(ModelOptions(config_name=str(tmp_path), config_overrides=text))
    assert (config.head_dim, config.num_key_value_heads) == (16, 4)


def test_config_name_when_layers_are_changed_then_lists_of_layers_follow(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen2", num_hidden_layers=4).save_pretrained(tmp_path)
    for num_layers in (2, 6):
        options = ModelOptions(config_name=str(tmp_path), config_overrides=f"num_hidden_layers={num_layers}")
        assert len(read_config(options).layer_types) == num_layers
