"""Cross entropy from hidden states, in chunks of rows, so that the logits of a batch are never in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llm.tokenization import IGNORE_INDEX

# Bytes of the float32 logits of one chunk. Smaller chunks read and write the gradient of the output layer more often;
# larger ones only need more memory. 4 x 1,024 tokens with GPT-2's vocabulary make four chunks.
MAX_CHUNK_BYTES = 256 * 2**20
# Milliseconds with whole logits and with chunks: 16 and 39 for a vocabulary of 65 tokens, 171 and 153 (150 and 148 in
# another run) for 1,024, 833 and 701 for 8,192; between the last two the gain is small. Forward and backward pass on
# one core, fp32, 4,096 rows x 384 (2,048 rows for the vocabulary of 8,192). Source: benchmarks/loss.py.
MIN_CHUNKED_VOCAB_SIZE = 2048
# Half of the range of fp16, because rounding can increase partial sums.
_FP16_SUM_LIMIT = 32_752.0
# Tensor cores are faster on matrices whose dimensions are multiples of this number.
_VOCAB_MULTIPLE = 64


def chunking_is_faster(vocab_size: int, min_vocab_size: int = MIN_CHUNKED_VOCAB_SIZE) -> bool:
    """Return whether `chunked_loss` is at least as fast as `loss_of_logits` for this vocabulary."""
    return vocab_size >= min_vocab_size


def loss_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of the logits, summed over the rows and computed in float32: fp32 scalar, in nats.

    Args:
        logits: [rows, vocab], any floating dtype.
        targets: int64 [rows]; rows with `IGNORE_INDEX` add nothing.
    """
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def chunked_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, max_chunk_bytes: int = MAX_CHUNK_BYTES
) -> Tensor:
    """Return `loss_of_logits(F.linear(hidden, weight, bias), targets)`: fp32 scalar, in nats.

    The gradients are computed in the forward pass, together with the loss. Under autocast the matrix products use its
    dtype; everything else is float32.

    Args:
        hidden: hidden states, [rows, width], any floating dtype.
        weight: weight of the output layer, [vocab, width].
        bias: bias of the output layer, [vocab], or None.
        targets: int64 [rows]; rows with `IGNORE_INDEX` add nothing.
        max_chunk_bytes: bytes of float32 logits that are in memory at once.
    """
    device = hidden.device.type
    autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        apply: Any = _ChunkedLoss.apply
        loss: Tensor = apply(hidden, weight, bias, targets, autocast_dtype, max_chunk_bytes)
        return loss
    needs_grad = (False, False, False)
    return _loss_and_gradients(hidden, weight, bias, targets, autocast_dtype, max_chunk_bytes, needs_grad)[0]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        autocast_dtype: torch.dtype | None,
        max_chunk_bytes: int,
    ) -> Tensor:
        needs_grad = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
        loss, *gradients = _loss_and_gradients(
            hidden, weight, bias, targets, autocast_dtype, max_chunk_bytes, needs_grad
        )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            # Scale in float32: fp16 can represent neither 1 / (tokens per step) nor a loss scale.
            None if gradient is None else (gradient.float() * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    autocast_dtype: torch.dtype | None,
    max_chunk_bytes: int,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Summed loss, and its gradients with respect to `hidden`, `weight` and `bias`; None where not needed."""
    vocab_size = weight.shape[0]
    weight, bias = _cast_and_pad(weight, bias, autocast_dtype)
    hidden = hidden.to(weight.dtype)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad[1] else None
    grad_bias = torch.zeros(vocab_size, dtype=torch.float32, device=hidden.device) if needs_grad[2] else None
    for begin, end in _chunks(len(hidden), len(weight), max_chunk_bytes):
        rows = hidden[begin:end]
        is_predicted = (targets[begin:end] != IGNORE_INDEX)[:, None]
        labels = targets[begin:end].clamp_min(0)[:, None]
        log_probs = _log_probs(rows, weight, bias, vocab_size)
        loss = loss - torch.where(is_predicted, log_probs.gather(1, labels), 0).sum()
        if not any(needs_grad):
            continue
        grad_logits = _grad_of_logits(log_probs, labels)
        if grad_bias is not None:
            grad_bias += torch.mv(grad_logits[:, :vocab_size].t(), is_predicted[:, 0].float())
        grad_logits = grad_logits.to(weight.dtype)
        # Rows without a target are set to zero here, in matrices of `width` columns instead of `vocab_size`.
        if grad_hidden is not None:
            grad_hidden[begin:end] = torch.mm(grad_logits, weight) * is_predicted
        if grad_weight is not None:
            _add_product(grad_weight, grad_logits.t(), rows * is_predicted)
        # Free both before the next chunk is computed.
        del log_probs, grad_logits
    return loss, grad_hidden, None if grad_weight is None else grad_weight[:vocab_size], grad_bias


def _cast_and_pad(
    weight: Tensor, bias: Tensor | None, autocast_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype of autocast, with zero rows up to a multiple of `_VOCAB_MULTIPLE`.

    Without autocast both are returned unchanged, so that nothing is copied.
    """
    if autocast_dtype is None:
        return weight, bias
    vocab_size, width = weight.shape
    padding = -vocab_size % _VOCAB_MULTIPLE
    padded = torch.cat([weight.to(autocast_dtype), weight.new_zeros(padding, width, dtype=autocast_dtype)])
    return padded, None if bias is None else F.pad(bias.to(autocast_dtype), (0, padding))


def _log_probs(rows: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int) -> Tensor:
    """Log probabilities of the tokens, float32 [rows, padded vocab]; -inf in the padding."""
    logits = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    logits[:, vocab_size:] = float("-inf")
    return logits.log_softmax(-1, dtype=torch.float32)


def _grad_of_logits(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the summed loss: probabilities, minus one at the labels; overwrites `log_probs` if not compiling."""
    if torch.compiler.is_compiling():  # the compiler fuses this form with what follows, but not a scatter
        columns = torch.arange(log_probs.shape[1], device=log_probs.device)
        return log_probs.exp() - (columns == labels).float()
    return log_probs.exp_().scatter_add_(1, labels, torch.full_like(labels, -1, dtype=torch.float32))


# One opaque operator for the compiler. Otherwise it would keep the products of all chunks and add them at the end.
@torch.library.custom_op("llm::add_product", mutates_args=("total",))
def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to the float32 matrix `total` in place; no element of `left` is larger than 1."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.dtype == torch.float16:
        # The sum over the rows of a very frequent token can exceed the range of fp16. A loss scale cannot prevent
        # this, because it is applied only in the backward pass.
        largest_sum = right.abs().amax().float() * right.shape[0]
        scale = torch.exp2((largest_sum / _FP16_SUM_LIMIT).log2().ceil()).clamp_min(1)
        total.addcmul_(torch.mm(left, (right / scale).to(right.dtype)).float(), scale)
    else:
        total += torch.mm(left, right)


def _chunks(num_rows: int, vocab_size: int, max_chunk_bytes: int) -> list[tuple[int, int]]:
    """Ranges of rows of equal length (the last may be shorter), each with at most `max_chunk_bytes` of logits."""
    num_chunks = max(1, -(-num_rows * vocab_size * 4 // max_chunk_bytes))
    length = -(-num_rows // num_chunks)
    return [(begin, min(begin + length, num_rows)) for begin in range(0, num_rows, length)]
