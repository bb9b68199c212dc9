"""The loss: summed, counted, in float32."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    masking_utils,
)

from llm.models.language_model import LanguageModel


def test_loss_when_some_targets_are_ignored_then_is_the_sum_of_the_others(
    tiny_gpt2: PreTrainedModel,
) -> None:
    ids = torch.randint(0, 257, (3, 17))
    targets = torch.randint(0, 257, (3, 17))
    targets[0, :5] = -100
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


def test_loss_when_experts_are_balanced_then_only_training_sees_it() -> None:
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
    trained, _ = model.train()(ids, ids)
    evaluated, num_tokens = model.eval()(ids, ids)
    balance = model.model(ids).aux_loss
    assert torch.allclose(trained - evaluated, 0.5 * balance * num_tokens, rtol=1e-4)


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
    search, warn = masking_utils.find_packed_sequence_indices, PreTrainedModel.warn_if_padding_and_no_attention_mask

    def read(tensor: torch.Tensor) -> bool:
        raise AssertionError("the device was read")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", read)
        patch.setattr(torch.Tensor, "item", read)
        found, _ = model(ids, ids)
    logits = model.model(ids).logits.flatten(0, 1)
    assert torch.equal(found, expected)
    assert torch.allclose(found, F.cross_entropy(logits, ids.flatten(), reduction="sum"))
    assert masking_utils.find_packed_sequence_indices is search
    assert PreTrainedModel.warn_if_padding_and_no_attention_mask is warn


def test_forward_when_compiled_then_is_one_graph_with_the_same_loss(
    tiny_gpt2: PreTrainedModel,
) -> None:
    model = LanguageModel(tiny_gpt2)
    ids = torch.randint(0, 257, (2, 16))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(ids, ids)[0], model(ids, ids)[0], rtol=1e-5)
