"""Attention and activations by other kernels: the same function, and no trace of them in any file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm.models import attention
from llm.models.activations import fuse_gelu
from llm.models.attention import NAME, by_rows, causal_attention, causal_mask, use_causal_attention
from llm.models.language_model import LanguageModel


def model_of(model_type: str = "gpt2", implementation: str | None = None, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, **more,
    )  # fmt: skip
    words = {} if implementation is None else {"attn_implementation": implementation}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **words)
    return model.eval()


def heads(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, length, 8, generator=draw).to(dtype).requires_grad_() for _ in range(3)]


@pytest.fixture
def _by_rows_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain products in parts of seven rows, whatever is fastest."""
    monkeypatch.setattr(attention, "_ROWS", 7)
    monkeypatch.setattr(attention, "_is_faster_by_rows", lambda *_: True)


@pytest.mark.parametrize("length", [1, 7, 30])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_by_rows_when_compared_with_sdpa_then_output_and_gradients_are_equal(
    length: int, scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_ROWS", 7)
    found = []
    for compute in (
        lambda q, k, v: by_rows(q, k, v, 0.0, scaling),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2),
    ):
        tensors = heads(length)
        output = compute(*tensors)
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        found.append([output.detach(), *(t.grad for t in tensors)])
    assert found[0][0].shape == (2, length, 4, 8)
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_causal_attention_when_weights_are_computed_again_then_gradients_are_the_same(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_HAS_BF16", True)
    compute = torch.compile(causal_attention, fullgraph=True) if compiled else causal_attention
    found = []
    for longest in (30, 29):
        monkeypatch.setattr(attention, "_KEPT", longest)
        tensors = heads(30, torch.bfloat16)
        output, _ = compute(torch.nn.Module(), *tensors, None)
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        found.append([output.detach(), *(t.grad for t in tensors)])
    for one, other in zip(*found, strict=True):
        # A compiler rounds less where it computes again.
        assert torch.allclose(one, other, rtol=2e-2, atol=2e-2) if compiled else torch.equal(one, other)


@pytest.mark.usefixtures("_by_rows_everywhere")
def test_causal_attention_when_computed_by_rows_then_its_output_can_be_viewed() -> None:
    output, _ = causal_attention(torch.nn.Module(), *heads(30), None)
    assert output.is_contiguous()  # as torch's own kernel gives it; some models take a view


def test_by_rows_when_in_bf16_then_is_within_rounding_of_float32() -> None:
    found = by_rows(*heads(30, torch.bfloat16), 0.0, None).detach()
    exact = by_rows(*heads(30), 0.0, None).detach()
    assert found.dtype == torch.bfloat16
    assert 0 < float((found - exact).abs().max()) < 3e-2


@pytest.mark.parametrize(
    ("dtype", "length", "is_native", "keeps"),
    [
        (torch.float32, 128, True, False),
        (torch.float16, 128, True, False),
        (torch.bfloat16, 128, False, False),
        (torch.bfloat16, 128, True, True),
        (torch.bfloat16, 512, True, True),
        (torch.bfloat16, 1024, True, False),
    ],
)
def test_causal_attention_when_in_bf16_then_keeps_the_weights_of_short_blocks_where_that_is_native(
    dtype: torch.dtype, length: int, is_native: bool, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_HAS_BF16", is_native)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        causal_attention(torch.nn.Module(), *heads(length, dtype), None)
    assert kept
    assert (max(kept) >= length**2) == keeps


def test_by_rows_when_there_is_dropout_then_a_share_of_the_weights_is_dropped() -> None:
    # Values that are the unit vectors show the weights themselves.
    query, key, value = torch.zeros(1, 1, 400, 8), torch.zeros(1, 1, 400, 8), torch.eye(400)[None, None]
    weights = by_rows(query, key, value, 0.25, None)[0, :, 0]
    seen = torch.ones(400, 400).tril().bool()
    share = float((weights[seen] == 0).float().mean())
    assert not weights[~seen].any()
    assert abs(share - 0.25) < 0.01
    assert torch.allclose(weights[399][weights[399] > 0], torch.tensor(1 / 400 / 0.75))


@pytest.mark.usefixtures("_by_rows_everywhere")
@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("gpt2", {}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("llama", {"num_key_value_heads": 2}),
        ("gpt_neox", {}),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
    ],
)
def test_forward_when_attention_is_ours_then_the_loss_is_the_same(model_type: str, more: dict[str, Any]) -> None:
    ids = torch.randint(50, (2, 30), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[*range(10), *range(20)], [*range(30)]])
    model = LanguageModel(model_of(model_type, **more))
    expected = [model(ids, ids)[0], model(ids, ids, positions)[0]]
    assert use_causal_attention(model.model)
    assert model.model.config._attn_implementation == NAME
    for found, other in zip([model(ids, ids)[0], model(ids, ids, positions)[0]], expected, strict=True):
        assert torch.allclose(found, other, rtol=1e-6)
    assert not torch.allclose(expected[0], expected[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "implementation", "more"),
    [
        ("gpt2", "eager", {}),
        ("gpt_neo", None, {"attention_types": [[["global", "local"], 1]]}),  # computes it itself
    ],
)
def test_use_causal_attention_when_a_model_takes_another_then_it_keeps_it(
    model_type: str, implementation: str | None, more: dict[str, Any]
) -> None:
    model = model_of(model_type, implementation, **more)
    before = model.config._attn_implementation
    assert not use_causal_attention(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_when_the_attention_drops_then_is_random_in_training_alone(dropout: float) -> None:
    inner = model_of(attn_pdrop=dropout, resid_pdrop=0.0, embd_pdrop=0.0)
    assert use_causal_attention(inner)
    model, ids = LanguageModel(inner), torch.randint(50, (2, 30))
    assert torch.equal(model(ids, ids)[0], model(ids, ids)[0])
    model.train()
    assert torch.equal(model(ids, ids)[0], model(ids, ids)[0]) is (dropout == 0)


def test_mask_when_the_model_is_compiled_then_none_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(model_of()).train()
    assert use_causal_attention(model.model)
    ids = torch.randint(50, (2, 30))
    masks: list[Any] = []

    def seen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
        masks.append(mask)
        return causal_attention(module, query, key, value, mask, **more)

    monkeypatch.setattr(attention.AttentionInterface, "_global_mapping", {NAME: seen})
    model.compile(backend="eager", fullgraph=True, dynamic=False)
    model(ids, ids)
    assert masks == [None, None]


def test_causal_mask_when_keys_are_padded_or_cached_then_one_is_built() -> None:
    more = {"batch_size": 1, "q_offset": 0, "kv_offset": 0}
    padded = torch.tensor([[False, True, True]])
    assert causal_mask(q_length=3, kv_length=3, **more) is None
    mask = causal_mask(q_length=3, kv_length=3, attention_mask=padded, **more)
    assert mask is not None
    assert mask[0, 0].tolist() == [[False] * 3, [False, True, False], [False, True, True]]
    assert causal_mask(q_length=3, kv_length=3, allow_is_causal_skip=False, **more) is not None


def test_generate_when_prompts_are_padded_then_writes_what_it_wrote_before() -> None:
    model = model_of()
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    words = {"attention_mask": (ids > 0).long(), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **words)
    assert use_causal_attention(model)
    assert fuse_gelu(model) == 2
    assert torch.equal(model.generate(ids, **words), expected)


def test_save_pretrained_when_kernels_were_replaced_then_writes_the_same_files(tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path / "before")
    use_causal_attention(model)
    fuse_gelu(model)
    model.save_pretrained(tmp_path / "after")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    config = json.loads((tmp_path / "after" / "config.json").read_text())
    assert config["activation_function"] == "gelu_new"
    assert NAME not in json.dumps(config)
