"""Attention by other kernels: the same function, and no trace of it in any file."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm.models import attention
from llm.models.activations import fuse_gelu
from llm.models.attention import (
    NAME,
    causal_attention,
    causal_mask,
    public_name,
    query_chunked_attention,
    use_causal_attention,
)
from llm.models.language_model import LanguageModel


def model_of(model_type: str = "gpt2", implementation: str | None = None, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, **changes,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.eval()


def make_heads(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value, [2, 4, length, 8] each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, length, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.fixture
def _chunks_of_seven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always compute attention in chunks, of seven queries each."""
    monkeypatch.setattr(attention, "query_chunked_attention", partial(query_chunked_attention, queries_per_chunk=7))
    monkeypatch.setattr(attention, "_chunking_is_faster", lambda *_: True)


@pytest.mark.parametrize("length", [1, 7, 30])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_query_chunked_attention_when_compared_with_sdpa_then_output_and_gradients_are_equal(
    length: int, scaling: float | None
) -> None:
    results = []
    for compute in (
        lambda q, k, v: query_chunked_attention(q, k, v, 0.0, scaling, queries_per_chunk=7),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2),
    ):
        tensors = make_heads(length)
        output = compute(*tensors)
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        results.append([output.detach(), *(t.grad for t in tensors)])
    assert results[0][0].shape == (2, length, 4, 8)
    for tensor, expected in zip(*results, strict=True):
        assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_causal_attention_when_weights_are_recomputed_then_gradients_are_the_same(compiled: bool) -> None:
    compute = torch.compile(causal_attention, fullgraph=True) if compiled else causal_attention
    results = []
    for max_stored_length in (30, 29):
        tensors = make_heads(30, torch.bfloat16)
        output, _ = compute(
            torch.nn.Module(), *tensors, None, max_stored_length=max_stored_length, has_native_bf16=True
        )
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        results.append([output.detach(), *(t.grad for t in tensors)])
    for stored, recomputed in zip(*results, strict=True):
        if compiled:  # the compiler rounds less when it recomputes
            assert torch.allclose(stored, recomputed, rtol=2e-2, atol=2e-2)
        else:
            assert torch.equal(stored, recomputed)


@pytest.mark.usefixtures("_chunks_of_seven")
def test_causal_attention_when_computed_in_chunks_then_output_is_contiguous() -> None:
    output, _ = causal_attention(torch.nn.Module(), *make_heads(30), None)
    assert output.is_contiguous()  # like the output of torch's own kernel, of which some models take a view


def test_query_chunked_attention_when_in_bf16_then_is_within_rounding_of_float32() -> None:
    result = query_chunked_attention(*make_heads(30, torch.bfloat16), 0.0, None).detach()
    exact = query_chunked_attention(*make_heads(30), 0.0, None).detach()
    assert result.dtype == torch.bfloat16
    assert 0 < float((result - exact).abs().max()) < 3e-2


@pytest.mark.parametrize(
    ("dtype", "length", "is_native", "stores_weights"),
    [
        (torch.float32, 128, True, False),
        (torch.float16, 128, True, False),
        (torch.bfloat16, 128, False, False),
        (torch.bfloat16, 128, True, True),
        (torch.bfloat16, 512, True, True),
        (torch.bfloat16, 1024, True, False),
    ],
)
def test_causal_attention_when_bf16_is_native_then_stores_the_weights_of_short_blocks(
    dtype: torch.dtype, length: int, is_native: bool, stores_weights: bool
) -> None:
    stored_sizes: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        stored_sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        causal_attention(torch.nn.Module(), *make_heads(length, dtype), None, has_native_bf16=is_native)
    assert stored_sizes
    assert (max(stored_sizes) >= length**2) == stores_weights


def test_query_chunked_attention_when_there_is_dropout_then_that_share_of_the_weights_is_zero() -> None:
    # The values are unit vectors, so the output is the attention weights.
    query, key, value = torch.zeros(1, 1, 400, 8), torch.zeros(1, 1, 400, 8), torch.eye(400)[None, None]
    weights = query_chunked_attention(query, key, value, 0.25, None)[0, :, 0]
    is_past = torch.ones(400, 400).tril().bool()
    share = float((weights[is_past] == 0).float().mean())
    assert not weights[~is_past].any()
    assert abs(share - 0.25) < 0.01
    assert torch.allclose(weights[399][weights[399] > 0], torch.tensor(1 / 400 / 0.75))


@pytest.mark.usefixtures("_chunks_of_seven")
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt2", {}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("llama", {"num_key_value_heads": 2}),
        ("gpt_neox", {}),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
    ],
)
def test_forward_when_attention_is_causal_attention_then_the_loss_is_the_same(
    model_type: str, changes: dict[str, Any]
) -> None:
    ids = torch.randint(50, (2, 30), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[*range(10), *range(20)], [*range(30)]])
    model = LanguageModel(model_of(model_type, **changes))
    expected_losses = [model(ids, ids)[0], model(ids, ids, positions)[0]]
    assert use_causal_attention(model.model)
    assert model.model.config._attn_implementation == NAME
    losses = [model(ids, ids)[0], model(ids, ids, positions)[0]]
    for loss, expected_loss in zip(losses, expected_losses, strict=True):
        assert torch.allclose(loss, expected_loss, rtol=1e-6)
    assert not torch.allclose(expected_losses[0], expected_losses[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "implementation", "changes"),
    [
        ("gpt2", "eager", {}),
        ("gpt_neo", None, {"attention_types": [[["global", "local"], 1]]}),  # implements its own attention
    ],
)
def test_use_causal_attention_when_model_has_another_attention_then_keeps_it(
    model_type: str, implementation: str | None, changes: dict[str, Any]
) -> None:
    model = model_of(model_type, implementation, **changes)
    before = model.config._attn_implementation
    assert not use_causal_attention(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_when_attention_has_dropout_then_is_random_in_training_only(dropout: float) -> None:
    inner = model_of(attn_pdrop=dropout, resid_pdrop=0.0, embd_pdrop=0.0)
    assert use_causal_attention(inner)
    model, ids = LanguageModel(inner), torch.randint(50, (2, 30))
    assert torch.equal(model(ids, ids)[0], model(ids, ids)[0])
    model.train()
    assert torch.equal(model(ids, ids)[0], model(ids, ids)[0]) is (dropout == 0)


def test_causal_mask_when_model_is_compiled_then_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(model_of()).train()
    assert use_causal_attention(model.model)
    ids = torch.randint(50, (2, 30))
    masks: list[Any] = []

    def record_mask(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        masks.append(mask)
        return causal_attention(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(attention.AttentionInterface, "_global_mapping", {NAME: record_mask})
    model.compile(backend="eager", fullgraph=True, dynamic=False)
    model(ids, ids)
    assert masks == [None, None]


def test_causal_mask_when_keys_are_padded_or_cached_then_is_a_mask() -> None:
    sizes = {"batch_size": 1, "q_offset": 0, "kv_offset": 0}
    padded = torch.tensor([[False, True, True]])
    assert causal_mask(q_length=3, kv_length=3, **sizes) is None
    mask = causal_mask(q_length=3, kv_length=3, attention_mask=padded, **sizes)
    assert mask is not None
    assert mask[0, 0].tolist() == [[False] * 3, [False, True, False], [False, True, True]]
    assert causal_mask(q_length=3, kv_length=3, allow_is_causal_skip=False, **sizes) is not None


def test_generate_when_prompts_are_padded_then_text_is_the_same_as_before() -> None:
    model = model_of()
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    settings = {"attention_mask": (ids > 0).long(), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    assert use_causal_attention(model)
    assert fuse_gelu(model) == 2
    assert torch.equal(model.generate(ids, **settings), expected)


def test_save_pretrained_when_kernels_are_replaced_then_writes_the_same_files(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("implementation", "expected"), [(NAME, "sdpa"), (None, "sdpa"), ("eager", "eager"), ("sdpa", "sdpa")]
)
def test_public_name_when_implementation_is_known_then_is_an_option_value(
    implementation: str | None, expected: str
) -> None:
    assert public_name(implementation) == expected
