"""Head and cross entropy by chunks: the numbers of whole logits, and never whole logits."""

from __future__ import annotations

import logging
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.loss import allocated
from llm.models import loss
from llm.models.language_model import LanguageModel
from llm.models.lm_head import has_linear_lm_head
from llm.models.loss import chunked_loss, loss_of_logits

ROWS, WIDTH, VOCABULARY = 37, 24, 131


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows a chunk, so that there are several and the last one is shorter, and every vocabulary is large."""
    monkeypatch.setattr(loss, "_CHUNK_BYTES", 10 * VOCABULARY * 4)
    monkeypatch.setattr(loss, "_LARGE", 1)


def inputs(*, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=draw).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw).requires_grad_()
    added = torch.randn(VOCABULARY, generator=draw).requires_grad_() if bias else None
    targets = torch.randint(VOCABULARY, (ROWS,), generator=draw)
    targets[[0, 5, 36]] = -100
    return hidden, weight, added, targets


def of(function: Any, *, bias: bool = False, scale: float = 0.25) -> list[Tensor]:
    """The loss, and the gradients of a multiple of it."""
    hidden, weight, added, targets = inputs(bias=bias)
    value = function(hidden, weight, added, targets)
    (value * scale).backward()
    return [value.detach(), *(t.grad for t in (hidden, weight, added) if t is not None and t.grad is not None)]


def whole(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return loss_of_logits(F.linear(hidden, weight, bias), targets)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [False, True])
def test_chunked_loss_when_compared_with_whole_logits_then_loss_and_gradients_are_equal(bias: bool) -> None:
    found, expected = of(chunked_loss, bias=bias), of(whole, bias=bias)
    assert len(found) == len(expected) == 3 + bias
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert difference(one, other) < 1e-6


def test_chunked_loss_when_in_bf16_then_is_float32_and_within_rounding_of_it() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = of(chunked_loss, bias=True), of(whole, bias=True)
    exact = of(whole, bias=True)
    assert [t.dtype for t in found] == [torch.float32] * 4
    for one, other, truth in zip(found, plain, exact, strict=True):
        # No worse than autocast of whole logits, whose gradients are of the same products.
        assert difference(one, truth) <= 1.2 * difference(other, truth) + 1e-6
        assert 0 < difference(one, truth) < 2e-2


def test_chunked_loss_when_no_gradient_is_asked_for_then_only_the_loss_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, _, targets = inputs()
    products: list[str] = []
    product = torch.mm

    def counted(left: Tensor, right: Tensor) -> Tensor:
        products.append("mm")
        return product(left, right)

    monkeypatch.setattr(torch, "mm", counted)
    with torch.no_grad():
        found = chunked_loss(hidden, weight, None, targets)
    assert len(products) == 4  # one a chunk: forward
    assert not found.requires_grad
    assert difference(found, whole(hidden, weight, None, targets).detach()) < 1e-6


def test_chunked_loss_when_the_head_is_frozen_then_only_states_get_a_gradient() -> None:
    hidden, weight, _, targets = inputs()
    weight.requires_grad_(False)
    chunked_loss(hidden, weight, None, targets).backward()
    assert weight.grad is None
    expected = torch.autograd.grad(whole(hidden, weight, None, targets), hidden)[0]
    assert hidden.grad is not None
    assert difference(hidden.grad, expected) < 1e-6


def test_chunked_loss_when_every_target_is_ignored_then_is_zero_without_a_gradient() -> None:
    hidden, weight, _, targets = inputs()
    found = chunked_loss(hidden, weight, None, torch.full_like(targets, -100))
    found.backward()
    assert found == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_chunked_loss_when_running_then_no_tensor_holds_all_logits(
    half: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            of_rows = isinstance(output, Tensor) and output.ndim == 2 and output.shape[0] != WIDTH
            if of_rows and VOCABULARY <= output.shape[1] <= VOCABULARY + 64:
                largest = max(largest, output.numel())
            return output

    with Watch(), torch.autocast("cpu", torch.bfloat16, enabled=half is not None):
        of(chunked_loss)
    assert 0 < largest <= 10 * (VOCABULARY + 64) < ROWS * VOCABULARY


def model_of(model_type: str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, **more,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


EXPERTS = {"num_local_experts": 2, "num_key_value_heads": 2, "output_router_logits": True}


@pytest.mark.parametrize(
    ("model_type", "more", "expected"),
    [
        ("gpt2", {}, True),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}, True),
        ("llama", {"tie_word_embeddings": False}, True),
        ("gptj", {"rotary_dim": 8}, True),  # its head has a bias
        ("gemma2", {"head_dim": 16, "num_key_value_heads": 2}, False),  # a soft cap
        ("cohere", {}, False),  # a scale
        ("granite", {"logits_scaling": 8.0}, False),
        ("mixtral", EXPERTS, False),  # a balancing loss
        ("mixtral", EXPERTS | {"output_router_logits": False}, True),
    ],
)
def test_has_plain_head_when_tried_then_tells_and_leaves_everything_as_it_was(
    model_type: str, more: dict[str, Any], expected: bool
) -> None:
    model = model_of(model_type, **more).train()
    state = torch.get_rng_state()
    assert has_linear_lm_head(model) is expected
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.get_output_embeddings()._forward_hooks


@pytest.mark.parametrize("model_type", ["gpt2", "gptj"])
def test_forward_when_the_vocabulary_is_large_then_loss_and_gradients_are_those_of_whole_logits(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    targets[0, :5] = -100
    found = {}
    for name, large in (("chunked", 1), ("whole", 10**6)):
        monkeypatch.setattr(loss, "_LARGE", large)
        model = LanguageModel(model_of(model_type, **({"rotary_dim": 8} if model_type == "gptj" else {})).eval())
        loss_sum, num_tokens = model.train()(ids, targets) if model_type == "gptj" else model(ids, targets)
        assert model._is_chunked is (name == "chunked")
        assert int(num_tokens) == 3 * 17 - 5
        (loss_sum / num_tokens).backward()
        grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found[name] = (loss_sum.detach(), grads)
    assert difference(found["chunked"][0], found["whole"][0]) < 1e-6
    assert found["chunked"][1].keys() == found["whole"][1].keys()
    for key, gradient in found["whole"][1].items():
        # Next to the largest one: that of the keys' bias is rounding alone.
        assert float((found["chunked"][1][key] - gradient).abs().max()) < 2e-6, key


def test_forward_when_the_architecture_caps_its_logits_then_uses_them_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = model_of("gemma2", head_dim=16, num_key_value_heads=2, final_logit_softcapping=0.01)
    model = LanguageModel(inner)
    ids = torch.randint(VOCABULARY, (2, 9))
    with caplog.at_level(logging.INFO):
        found, _ = model(ids, ids)
        model(ids, ids)
    assert [record.message for record in caplog.records if "gemma2" in record.message] == [
        "loss: gemma2 does more than a linear head; its logits are kept whole"
    ]
    expected = F.cross_entropy(inner(ids).logits.flatten(0, 1), ids.flatten(), reduction="sum")
    assert torch.allclose(found, expected, rtol=1e-6)


def test_forward_when_compiled_then_chunks_give_the_same_gradients() -> None:
    ids = torch.randint(VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))
    gradients = []
    for compiled in (False, True):
        model = LanguageModel(model_of("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
        if compiled:
            model.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        model(ids, ids)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert difference(*gradients) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_chunked_loss_when_compiled_then_products_of_chunks_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width, vocabulary, num_chunks = 128, 256, 2048, 8
    monkeypatch.setattr(loss, "_CHUNK_BYTES", rows // num_chunks * vocabulary * 4)
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,))
    compiled = torch.compile(chunked_loss, dynamic=False)

    def run() -> Tensor:
        weight.grad = hidden.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            compiled(hidden, weight, None, targets).backward()
        assert weight.grad is not None
        return weight.grad

    found = run()
    # The sum and its double where it is scaled, in float32; the head and one product, in bf16.
    most = allocated(run)
    assert most * 1e6 < 3 * weight.nbytes + rows * vocabulary * 4
    with torch.compiler.set_stance("force_eager"):
        assert difference(run(), found) < 1e-2


def test_chunked_loss_when_a_token_is_frequent_then_its_fp16_gradient_stays_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "_CHUNK_BYTES", 2**20)
    hidden = torch.full((3000, 4), 60.0)
    weight = torch.zeros(3, 4, requires_grad=True)
    targets = torch.zeros(3000, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        value = chunked_loss(hidden, weight, None, targets)
    (value / 1024).backward()
    assert weight.grad is not None
    # Of 3,000 rows of 60, two thirds of the first token, beyond fp16's 65,504, and one of each other.
    expected = torch.tensor([[-2.0], [1.0], [1.0]]).expand(3, 4) * 3000 * 60 / 3 / 1024
    torch.testing.assert_close(weight.grad, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("length", [1, 3, 7])
def test_has_plain_head_when_a_model_reads_few_tokens_then_tells_all_the_same(length: int) -> None:
    assert has_linear_lm_head(model_of("gpt2", n_positions=length))
