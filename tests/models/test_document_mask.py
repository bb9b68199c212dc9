"""Documents in one row: no token attends to another document, and models that cannot do this are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, masking_utils

from llm.config.errors import UserError
from llm.models.document_mask import require_document_mask
from llm.models.language_model import LanguageModel
from llm.tokenization import IGNORE_INDEX

LENGTHS = ([9, 1, 6, 16], [1, 1, 30], [32])
POSITIONS = torch.tensor([[i for length in row for i in range(length)] for row in LENGTHS])
CPU = torch.device("cpu")


def build(model_type: str, attention: str = "eager", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, **changes,
    )  # fmt: skip
    # Large weights, so that attention to another document changes the logits visibly.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model.eval()


def packed_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets, int64 [3, 32] each; the first token of a document is not predicted."""
    ids = torch.randint(50, (3, 33), generator=torch.Generator().manual_seed(1))
    is_start = torch.cat([POSITIONS[:, 1:], torch.ones(3, 1, dtype=torch.int64)], 1) == 0
    return ids[:, :-1], ids[:, 1:].masked_fill(is_start, IGNORE_INDEX)


def loss_of_documents(model: LanguageModel) -> tuple[torch.Tensor, int]:
    """Loss and number of targets, summed over the documents, each computed alone."""
    ids, targets = packed_rows()
    total_loss = torch.zeros(())
    total_tokens = 0
    for row, lengths in enumerate(LENGTHS):
        for document, document_targets in zip(ids[row].split(lengths), targets[row].split(lengths), strict=True):
            loss_sum, num_tokens = model(document[None], document_targets[None])
            total_loss = total_loss + loss_sum
            total_tokens += int(num_tokens)
    return total_loss, total_tokens


@pytest.mark.parametrize(("model_type", "attention"), [("gpt2", "sdpa"), ("gpt2", "eager"), ("llama", "sdpa")])
def test_loss_when_positions_are_given_then_equals_that_of_the_documents_alone(model_type: str, attention: str) -> None:
    model = LanguageModel(build(model_type, attention))
    expected, expected_tokens = loss_of_documents(model)
    loss_sum, num_tokens = model(*packed_rows(), POSITIONS)
    assert torch.allclose(loss_sum, expected, rtol=1e-5)
    assert int(num_tokens) == expected_tokens == 3 * 32 - 3 - 2
    # Without positions the loss differs, so this test can fail.
    assert not torch.allclose(model(*packed_rows())[0], expected, rtol=1e-3)


def test_gradient_when_positions_are_given_then_equals_that_of_the_documents_alone() -> None:
    model = LanguageModel(build("gpt2", "sdpa"))
    gradients = []
    for loss in (loss_of_documents(model)[0], model(*packed_rows(), POSITIONS)[0]):
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_loss_when_compiled_then_is_one_graph_with_the_same_loss(backend: str) -> None:
    model = LanguageModel(build("gpt2", "sdpa"))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.allclose(compiled(*packed_rows(), POSITIONS)[0], model(*packed_rows(), POSITIONS)[0], rtol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "llama"])
def test_forward_when_positions_are_given_then_never_reads_the_device(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"attention_types": [[["global", "local"], 1]]} if model_type == "gpt_neo" else {}
    model = LanguageModel(build(model_type, **changes))
    find_documents = masking_utils.find_packed_sequence_indices

    def refuse(tensor: torch.Tensor) -> bool:
        raise AssertionError("the device was read")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", refuse)
        patch.setattr(torch.Tensor, "item", refuse)
        loss_sum, _ = model(*packed_rows(), POSITIONS)
    assert torch.allclose(loss_sum, loss_of_documents(model)[0], rtol=1e-5)
    assert masking_utils.find_packed_sequence_indices is find_documents


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("mistral", {"sliding_window": 4, "num_key_value_heads": 2}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
        ("gpt2", {"n_positions": 7}),  # the row is as long as the context
        ("gpt2", {"n_positions": 2}),
    ],
)
def test_require_document_mask_when_documents_are_kept_apart_then_changes_nothing(
    model_type: str, changes: dict[str, Any]
) -> None:
    model = build(model_type, **changes).train()
    state = torch.get_rng_state()
    require_document_mask(model, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("bloom", {"n_head": 2}),  # computes its positions itself
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32}),  # does not pass positions to the mask
        ("rwkv", {"attention_hidden_size": 32}),  # recurrent
    ],
)
def test_require_document_mask_when_documents_are_not_kept_apart_then_refuses_in_one_line(
    model_type: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as refusal:
        require_document_mask(build(model_type, **changes), CPU)
    message = str(refusal.value)
    assert message.startswith(f"--document_mask: {model_type} with --attn_implementation eager does not keep documents")
    assert len(message.splitlines()) == 1


def test_forward_when_attention_is_flash_then_the_batch_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    # The library runs on CUDA only, so this checks that its inputs are those its documentation requires.
    model = LanguageModel(build("llama", "sdpa"))
    expected, _ = model(*packed_rows(), POSITIONS)
    shapes: list[torch.Size] = []
    forward = type(model.model).forward

    def recording_forward(self: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> Any:
        shapes.append(input_ids.shape)
        assert position_ids.tolist() == [POSITIONS.flatten().tolist()]
        return forward(self, input_ids=input_ids, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", recording_forward)
    monkeypatch.setattr("llm.models.language_model.uses_flash", lambda _: True)
    loss_sum, _ = model(*packed_rows(), POSITIONS)
    assert shapes == [torch.Size([1, 96])]
    assert torch.allclose(loss_sum, expected, rtol=1e-5)
