"""Documents that share a row and do not see each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, masking_utils

from llm.config.errors import UserError
from llm.models.document_mask import require_document_mask
from llm.models.language_model import LanguageModel

LENGTHS = ([9, 1, 6, 16], [1, 1, 30], [32])
POSITIONS = torch.tensor([[i for length in row for i in range(length)] for row in LENGTHS])
CPU = torch.device("cpu")


def build(model_type: str, attention: str = "eager", **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, **more,
    )  # fmt: skip
    # Large weights, so that a document which sees another one is seen to do so.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model.eval()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and targets that begin no document."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (3, 33), generator=draw)
    begins = torch.cat([POSITIONS[:, 1:], torch.ones(3, 1, dtype=torch.int64)], 1) == 0
    return ids[:, :-1], ids[:, 1:].masked_fill(begins, -100)


def apart(model: LanguageModel) -> tuple[torch.Tensor, int]:
    """Loss and count of a loop over the documents, each on its own."""
    ids, targets = rows()
    loss, count = torch.zeros(()), 0
    for row, lengths in enumerate(LENGTHS):
        pieces = zip(ids[row].split(lengths), targets[row].split(lengths), strict=True)
        for piece, aims in pieces:
            loss_sum, number = model(piece[None], aims[None])
            loss, count = loss + loss_sum, count + int(number)
    return loss, count


@pytest.mark.parametrize(("model_type", "attention"), [("gpt2", "sdpa"), ("gpt2", "eager"), ("llama", "sdpa")])
def test_loss_when_positions_are_given_then_is_that_of_the_documents_alone(model_type: str, attention: str) -> None:
    model = LanguageModel(build(model_type, attention))
    expected, count = apart(model)
    loss, number = model(*rows(), POSITIONS)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert int(number) == count == 3 * 32 - 3 - 2
    # Otherwise this could not fail.
    assert not torch.allclose(model(*rows())[0], expected, rtol=1e-3)


def test_gradient_when_positions_are_given_then_is_that_of_the_documents_alone() -> None:
    model = LanguageModel(build("gpt2", "sdpa"))
    gradients = []
    for loss in (apart(model)[0], model(*rows(), POSITIONS)[0]):
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_loss_when_compiled_then_one_graph_and_the_same(backend: str) -> None:
    model = LanguageModel(build("gpt2", "sdpa"))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.allclose(compiled(*rows(), POSITIONS)[0], model(*rows(), POSITIONS)[0], rtol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "llama"])
def test_forward_when_positions_are_given_then_never_reads_the_device(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"attention_types": [[["global", "local"], 1]]} if model_type == "gpt_neo" else {}
    model = LanguageModel(build(model_type, **more))
    search = masking_utils.find_packed_sequence_indices

    def read(tensor: torch.Tensor) -> bool:
        raise AssertionError("the device was read")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", read)
        patch.setattr(torch.Tensor, "item", read)
        found, _ = model(*rows(), POSITIONS)
    assert torch.allclose(found, apart(model)[0], rtol=1e-5)
    assert masking_utils.find_packed_sequence_indices is search


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("mistral", {"sliding_window": 4, "num_key_value_heads": 2}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
        ("gpt2", {"n_positions": 7}),  # a row of all that it reads
        ("gpt2", {"n_positions": 2}),
    ],
)
def test_require_document_mask_when_it_is_honoured_then_nothing_changes(model_type: str, more: dict[str, Any]) -> None:
    model = build(model_type, **more).train()
    state = torch.get_rng_state()
    require_document_mask(model, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("bloom", {"n_head": 2}),  # its positions are computed inside
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32}),  # it does not hand positions to the mask
        ("rwkv", {"attention_hidden_size": 32}),  # recurrent
    ],
)
def test_require_document_mask_when_it_is_not_honoured_then_one_line(model_type: str, more: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refusal:
        require_document_mask(build(model_type, **more), CPU)
    message = str(refusal.value)
    assert message.startswith(f"--document_mask: {model_type} with --attn_implementation eager does not keep documents")
    assert len(message.splitlines()) == 1


def test_forward_when_attention_is_flash_then_documents_lie_in_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    # The library itself runs on CUDA only; what it is given is what its documentation wants.
    model = LanguageModel(build("llama", "sdpa"))
    expected, _ = model(*rows(), POSITIONS)
    given: list[torch.Size] = []
    forward = type(model.model).forward

    def seen(self: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, **more: Any) -> Any:
        given.append(input_ids.shape)
        assert position_ids.tolist() == [POSITIONS.flatten().tolist()]
        return forward(self, input_ids=input_ids, position_ids=position_ids, **more)

    monkeypatch.setattr(type(model.model), "forward", seen)
    monkeypatch.setattr("llm.models.language_model.uses_flash", lambda _: True)
    found, _ = model(*rows(), POSITIONS)
    assert given == [torch.Size([1, 96])]
    assert torch.allclose(found, expected, rtol=1e-5)
