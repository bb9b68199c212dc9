"""Models built from scratch or loaded with weights, and the weights that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm.config.errors import UsageError, UserError
from llm.config.options import ModelOptions
from llm.models.build import build_model
from llm.models.config import load_config

SMALL = "n_layer=1,n_embd=32,n_head=2,n_positions=64"


def _build(tokenizer, **options: object) -> tuple[PreTrainedModel, str]:
    table = ModelOptions.model_validate(options)
    return build_model(table, load_config(table, tokenizer), tokenizer)


def test_build_when_no_model_is_named_then_is_a_gpt2_with_the_tokens_of_the_tokenizer(byte_tokenizer) -> None:
    model, origin = _build(byte_tokenizer, config_overrides=SMALL)
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
def test_build_when_other_model_type_then_reloads_and_is_causal(
    model_type: str, overrides: str, byte_tokenizer, tmp_path: Path
) -> None:
    model, _ = _build(byte_tokenizer, model_type=model_type, config_overrides=overrides)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(8).unsqueeze(0)
    changed = ids.clone()
    changed[0, -1] = 99
    with torch.no_grad():
        first, second = reloaded(ids).logits, reloaded(changed).logits
        assert torch.equal(first, model.eval()(ids).logits)
    assert torch.allclose(first[:, :-1], second[:, :-1], atol=1e-6)


def test_build_when_seed_is_the_same_then_weights_are_equal(byte_tokenizer) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(_build(byte_tokenizer, config_overrides=SMALL)[0].state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_build_when_overrides_fit_no_model_then_error_is_one_line(byte_tokenizer) -> None:
    with pytest.raises(UsageError, match="config_overrides"):
        _build(byte_tokenizer, config_overrides="n_embd=33,n_head=2,n_layer=1")


def test_build_when_weights_are_loaded_then_dropout_is_set(byte_tokenizer, tiny_gpt2_dir) -> None:
    model, _ = _build(byte_tokenizer, model_name_or_path=str(tiny_gpt2_dir), dropout=0.25)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_load_when_half_precision_on_disk_then_is_float32(
    byte_tokenizer, tiny_gpt2: PreTrainedModel, tmp_path: Path
) -> None:
    tiny_gpt2.half().save_pretrained(tmp_path)
    model, origin = _build(byte_tokenizer, model_name_or_path=str(tmp_path))
    assert origin == f"loaded from {tmp_path}"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, tiny_gpt2.lm_head.weight.float())


def test_load_when_embeddings_are_padded_then_drops_rows_and_logs_it(
    tiny_gpt2: PreTrainedModel, byte_tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tiny_gpt2.resize_token_embeddings(320)
    tiny_gpt2.save_pretrained(tmp_path)
    model, _ = _build(byte_tokenizer, model_name_or_path=str(tmp_path))
    assert model.config.vocab_size == 257 == model.lm_head.weight.shape[0]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "320 rows" in caplog.text and "257" in caplog.text


def _save_with(model: PreTrainedModel, folder: Path, change: str) -> str:
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
        ("missing", r"weights that are missing: transformer\.h\.1\.mlp\.c_fc\.weight"),
        ("mismatched", r"shapes .*transformer\.h\.1\.mlp\.c_fc\.weight"),
        ("damaged", r"model\.safetensors is damaged"),
        ("absent", r"no weights in this folder"),
    ],
)
def test_load_when_weights_are_bad_then_error_is_one_line(
    change: str, cause: str, tiny_gpt2: PreTrainedModel, byte_tokenizer, tmp_path: Path, capfd
) -> None:
    folder = _save_with(tiny_gpt2, tmp_path, change)
    capfd.readouterr()
    with pytest.raises(UserError, match=cause) as caught:
        _build(byte_tokenizer, model_name_or_path=folder)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_load_when_weights_are_unused_then_logs_their_names(
    tiny_gpt2: PreTrainedModel, byte_tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _build(byte_tokenizer, model_name_or_path=_save_with(tiny_gpt2, tmp_path, "unused"))
    assert "something.weight" in caplog.text


@pytest.mark.parametrize("loaded", [False, True])
def test_attention_when_unknown_then_error_is_one_line(loaded: bool, byte_tokenizer, tiny_gpt2_dir: Path) -> None:
    source = {"model_name_or_path": str(tiny_gpt2_dir)} if loaded else {"config_overrides": SMALL}
    with pytest.raises(UserError, match="--attn_implementation fast: ") as caught:
        _build(byte_tokenizer, attn_implementation="fast", **source)
    assert "\n" not in str(caught.value)


def test_attention_when_eager_then_model_uses_it(byte_tokenizer) -> None:
    model, _ = _build(byte_tokenizer, config_overrides=SMALL, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_gradient_checkpointing_when_on_then_gradients_are_the_same(byte_tokenizer) -> None:
    ids = torch.arange(16).unsqueeze(0)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, _ = _build(
            byte_tokenizer,
            config_overrides=SMALL,
            dropout=0.0,
            gradient_checkpointing=checkpointing,
        )
        assert model.transformer.h[0].gradient_checkpointing == checkpointing
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
        gradients.append(model.transformer.h[0].mlp.c_fc.weight.grad)
    assert torch.allclose(gradients[0], gradients[1])
