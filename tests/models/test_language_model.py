"""The trained module: its loss is summed, counted and in float32, whole or in chunks, and never reads the device."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    masking_utils,
)

from llm.models import language_model
from llm.models.language_model import LanguageModel
from llm.models.loss import chunked_loss
from llm.tokenization import IGNORE_INDEX
from tests.models.models import VOCAB_SIZE, build_model


def test_loss_when_some_targets_are_ignored_then_is_the_sum_over_the_others(
    tiny_gpt2: PreTrainedModel,
) -> None:
    ids = torch.randint(0, 257, (3, 17))
    targets = torch.randint(0, 257, (3, 17))
    targets[0, :5] = IGNORE_INDEX
    loss_sum, num_tokens = LanguageModel(tiny_gpt2)(ids, targets)
    logits = tiny_gpt2(ids).logits
    expected = sum(
        -F.log_softmax(logits[b, t], dim=-1)[targets[b, t]] for b in range(3) for t in range(17) if targets[b, t] >= 0
    )
    assert torch.allclose(loss_sum, expected, rtol=1e-5)
    assert num_tokens.item() == 3 * 17 - 5
    assert (loss_sum.dtype, num_tokens.dtype) == (torch.float32, torch.int64)
    assert loss_sum.shape == num_tokens.shape == ()


def test_loss_when_labels_shifted_by_hf_then_agrees(tiny_gpt2: PreTrainedModel) -> None:
    row = torch.randint(0, 257, (2, 33))
    loss_sum, num_tokens = LanguageModel(tiny_gpt2)(row[:, :-1], row[:, 1:])
    assert torch.allclose(loss_sum / num_tokens, tiny_gpt2(row, labels=row).loss, rtol=1e-5)


def test_loss_when_autocast_to_bf16_then_is_float32(tiny_gpt2: PreTrainedModel) -> None:
    ids = torch.randint(0, 257, (2, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_sum, _ = LanguageModel(tiny_gpt2)(ids, ids)
    assert loss_sum.dtype == torch.float32


def test_loss_when_experts_are_balanced_then_only_training_adds_the_balancing_loss() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LanguageModel(MixtralForCausalLM(config))
    ids = torch.randint(0, 50, (2, 8))
    training_loss, _ = model.train()(ids, ids)
    evaluation_loss, num_tokens = model.eval()(ids, ids)
    balancing_loss = model.model(ids).aux_loss
    assert torch.allclose(training_loss - evaluation_loss, 0.5 * balancing_loss * num_tokens, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "llama"])
def test_forward_when_running_then_never_reads_the_device(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model(
        model_type, vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, attention_types=[[["global", "local"], 1]],
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LanguageModel(AutoModelForCausalLM.from_config(config))
    ids = torch.randint(0, 50, (3, 8))
    expected, _ = model.eval()(ids, ids)
    find_documents = masking_utils.find_packed_sequence_indices
    warn_of_padding = PreTrainedModel.warn_if_padding_and_no_attention_mask

    def refuse(tensor: Tensor) -> bool:
        raise AssertionError("the device was read")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", refuse)
        patch.setattr(torch.Tensor, "item", refuse)
        loss_sum, _ = model(ids, ids)
    logits = model.model(ids).logits.flatten(0, 1)
    assert torch.equal(loss_sum, expected)
    assert torch.allclose(loss_sum, F.cross_entropy(logits, ids.flatten(), reduction="sum"))
    assert masking_utils.find_packed_sequence_indices is find_documents
    assert PreTrainedModel.warn_if_padding_and_no_attention_mask is warn_of_padding


def test_forward_when_compiled_then_is_one_graph_with_the_same_loss(
    tiny_gpt2: PreTrainedModel,
) -> None:
    model = LanguageModel(tiny_gpt2)
    ids = torch.randint(0, 257, (2, 16))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(ids, ids)[0], model(ids, ids)[0], rtol=1e-5)


@pytest.fixture
def _chunks_of_ten_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the chunked loss for every vocabulary, with ten rows per chunk."""
    small_chunks = partial(chunked_loss, max_chunk_bytes=10 * VOCAB_SIZE * 4)
    monkeypatch.setattr(language_model, "chunking_is_faster", lambda vocab_size: True)
    monkeypatch.setattr(language_model, "chunked_loss", small_chunks)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


@pytest.mark.usefixtures("_chunks_of_ten_rows")
@pytest.mark.parametrize("model_type", ["gpt2", "gptj"])
def test_forward_when_the_vocabulary_is_large_then_loss_and_gradients_equal_those_of_whole_logits(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(VOCAB_SIZE, (3, 17), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    targets[0, :5] = IGNORE_INDEX
    losses: dict[bool, Tensor] = {}
    gradients: dict[bool, dict[str, Tensor]] = {}
    for is_chunked in (True, False):
        monkeypatch.setattr(language_model, "chunking_is_faster", lambda _, is_chunked=is_chunked: is_chunked)
        model = LanguageModel(build_model(model_type, **({"rotary_dim": 8} if model_type == "gptj" else {})).eval())
        loss_sum, num_tokens = model.train()(ids, targets) if model_type == "gptj" else model(ids, targets)
        assert model._is_chunked is is_chunked
        assert int(num_tokens) == 3 * 17 - 5
        (loss_sum / num_tokens).backward()
        losses[is_chunked] = loss_sum.detach()
        gradients[is_chunked] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error(losses[True], losses[False]) < 1e-6
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[False].items():
        # An absolute bound, because the gradient of the bias of the keys is rounding error only.
        assert float((gradients[True][name] - gradient).abs().max()) < 2e-6, name


@pytest.mark.usefixtures("_chunks_of_ten_rows")
def test_forward_when_the_architecture_caps_its_logits_then_uses_whole_logits_and_logs_it_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = build_model("gemma2", head_dim=16, num_key_value_heads=2, final_logit_softcapping=0.01)
    model = LanguageModel(inner)
    ids = torch.randint(VOCAB_SIZE, (2, 9))
    with caplog.at_level(logging.INFO):
        loss_sum, _ = model(ids, ids)
        model(ids, ids)
    (message,) = [record.message for record in caplog.records if "gemma2" in record.message]
    assert "whole logits" in message
    expected = F.cross_entropy(inner(ids).logits.flatten(0, 1), ids.flatten(), reduction="sum")
    assert torch.allclose(loss_sum, expected, rtol=1e-6)


@pytest.mark.usefixtures("_chunks_of_ten_rows")
def test_forward_when_compiled_then_chunks_give_the_same_gradients() -> None:
    ids = torch.randint(VOCAB_SIZE, (3, 17), generator=torch.Generator().manual_seed(1))
    gradients = []
    for compiled in (False, True):
        model = LanguageModel(build_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
        if compiled:
            model.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        model(ids, ids)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert relative_error(gradients[1], gradients[0]) < 1e-6
