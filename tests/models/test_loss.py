"""The chunked loss: equal to the loss of whole logits, without whole logits in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.loss import allocated
from llm.models import loss
from llm.models.loss import chunking_is_faster, loss_of_logits
from llm.tokenization import IGNORE_INDEX

ROWS, WIDTH, VOCAB_SIZE = 37, 24, 131
# Ten rows per chunk: several chunks, of which the last one is shorter.
chunked_loss = partial(loss.chunked_loss, max_chunk_bytes=10 * VOCAB_SIZE * 4)


def make_inputs(*, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB_SIZE, WIDTH, generator=generator).requires_grad_()
    bias_vector = torch.randn(VOCAB_SIZE, generator=generator).requires_grad_() if bias else None
    targets = torch.randint(VOCAB_SIZE, (ROWS,), generator=generator)
    targets[[0, 5, 36]] = IGNORE_INDEX
    return hidden, weight, bias_vector, targets


def loss_and_gradients(function: Callable[..., Tensor], *, bias: bool = False, scale: float = 0.25) -> list[Tensor]:
    """The loss, and the gradients of `scale` times the loss."""
    hidden, weight, bias_vector, targets = make_inputs(bias=bias)
    value = function(hidden, weight, bias_vector, targets)
    (value * scale).backward()
    leaves = [leaf for leaf in (hidden, weight, bias_vector) if leaf is not None]
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def whole_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return loss_of_logits(F.linear(hidden, weight, bias), targets)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def test_chunking_is_faster_when_vocabulary_has_2048_tokens_or_more() -> None:
    assert [chunking_is_faster(size) for size in (65, 2047, 2048, 50257)] == [False, False, True, True]


@pytest.mark.parametrize("bias", [False, True])
def test_chunked_loss_when_compared_with_whole_logits_then_loss_and_gradients_are_equal(bias: bool) -> None:
    results = loss_and_gradients(chunked_loss, bias=bias)
    expected = loss_and_gradients(whole_loss, bias=bias)
    assert len(results) == len(expected) == (4 if bias else 3)
    for tensor, expected_tensor in zip(results, expected, strict=True):
        assert tensor.dtype == torch.float32
        assert relative_error(tensor, expected_tensor) < 1e-6


def test_chunked_loss_when_in_bf16_then_is_float32_and_within_rounding() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        chunked = loss_and_gradients(chunked_loss, bias=True)
        whole = loss_and_gradients(whole_loss, bias=True)
    exact = loss_and_gradients(whole_loss, bias=True)
    assert [t.dtype for t in chunked] == [torch.float32] * 4
    for tensor, whole_tensor, exact_tensor in zip(chunked, whole, exact, strict=True):
        # No worse than autocast of whole logits, whose gradients come from the same products.
        assert relative_error(tensor, exact_tensor) <= 1.2 * relative_error(whole_tensor, exact_tensor) + 1e-6
        assert 0 < relative_error(tensor, exact_tensor) < 2e-2


def test_chunked_loss_when_no_gradient_is_needed_then_only_the_loss_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, _, targets = make_inputs()
    products: list[str] = []
    mm = torch.mm

    def counting_mm(left: Tensor, right: Tensor) -> Tensor:
        products.append("mm")
        return mm(left, right)

    monkeypatch.setattr(torch, "mm", counting_mm)
    with torch.no_grad():
        result = chunked_loss(hidden, weight, None, targets)
    assert len(products) == 4  # one per chunk: the logits
    assert not result.requires_grad
    assert relative_error(result, whole_loss(hidden, weight, None, targets).detach()) < 1e-6


def test_chunked_loss_when_the_weight_is_frozen_then_only_hidden_states_get_a_gradient() -> None:
    hidden, weight, _, targets = make_inputs()
    weight.requires_grad_(False)
    chunked_loss(hidden, weight, None, targets).backward()
    assert weight.grad is None
    expected = torch.autograd.grad(whole_loss(hidden, weight, None, targets), hidden)[0]
    assert hidden.grad is not None
    assert relative_error(hidden.grad, expected) < 1e-6


def test_chunked_loss_when_every_target_is_ignored_then_loss_and_gradients_are_zero() -> None:
    hidden, weight, _, targets = make_inputs()
    result = chunked_loss(hidden, weight, None, torch.full_like(targets, IGNORE_INDEX))
    result.backward()
    assert result == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_chunked_loss_when_running_then_no_tensor_holds_all_logits(autocast: bool) -> None:
    largest = 0

    class LargestLogits(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            has_rows = isinstance(output, Tensor) and output.ndim == 2 and output.shape[0] != WIDTH
            if has_rows and VOCAB_SIZE <= output.shape[1] <= VOCAB_SIZE + 64:
                largest = max(largest, output.numel())
            return output

    with LargestLogits(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss_and_gradients(chunked_loss)
    assert 0 < largest <= 10 * (VOCAB_SIZE + 64) < ROWS * VOCAB_SIZE


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_chunked_loss_when_compiled_then_products_of_chunks_are_not_kept() -> None:
    rows, width, vocab_size, num_chunks = 128, 256, 2048, 8
    max_chunk_bytes = rows // num_chunks * vocab_size * 4
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab_size, width, requires_grad=True)
    targets = torch.randint(vocab_size, (rows,))
    compiled = torch.compile(loss.chunked_loss, dynamic=False)

    def run() -> Tensor:
        weight.grad = hidden.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            compiled(hidden, weight, None, targets, max_chunk_bytes).backward()
        assert weight.grad is not None
        return weight.grad

    result = run()
    # In float32 the sum and its scaled copy; in bf16 the weight and one product.
    peak_megabytes = allocated(run)
    assert peak_megabytes * 1e6 < 3 * weight.nbytes + rows * vocab_size * 4
    with torch.compiler.set_stance("force_eager"):
        assert relative_error(run(), result) < 1e-2


def test_chunked_loss_when_a_token_is_frequent_then_its_fp16_gradient_stays_finite() -> None:
    hidden = torch.full((3000, 4), 60.0)
    weight = torch.zeros(3, 4, requires_grad=True)
    targets = torch.zeros(3000, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        value = loss.chunked_loss(hidden, weight, None, targets, 2**20)
    (value / 1024).backward()
    assert weight.grad is not None
    # Sums over 3,000 rows of 60: -2/3 of each row for the first token, beyond fp16's 65,504, and 1/3 for the others.
    expected = torch.tensor([[-2.0], [1.0], [1.0]]).expand(3, 4) * 3000 * 60 / 3 / 1024
    torch.testing.assert_close(weight.grad, expected, rtol=2e-3, atol=0)
