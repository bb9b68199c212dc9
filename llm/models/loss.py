"""Head and cross entropy by chunks of rows: the logits of a whole batch are never there at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llm.tokenization import IGNORE_INDEX

# Bytes of one chunk's logits in float32. Smaller ones read and write the head's gradient more often, larger ones
# only take memory: 4 x 1,024 tokens of GPT-2's vocabulary make four chunks.
_CHUNK_BYTES = 256 * 2**20
# At 65 tokens whole logits take 16 ms and chunks 39, at 1,024 171 and 153 (another time 150 and 148), at 8,192 833 and
# 701: between, there is little to win (forward and backward, one core, fp32, 4,096 rows x 384, of 8,192 half as many;
# benchmarks/loss.py).
_LARGE = 2048
# Half of fp16's range: sums are rounded on their way.
_FP16_ROOM = 32_752.0
# Products over a multiple of this run faster on tensor cores.
_COLUMNS = 64


def chunking_is_faster(vocabulary: int) -> bool:
    """Whether `chunked_loss` is at least as fast as whole logits."""
    return vocabulary >= _LARGE


def loss_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of logits that are there, summed, in float32 also where they are not.

    Args:
        logits: [rows, vocabulary].
        targets: int64 [rows]; -100 where there is none.
    """
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def chunked_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """`loss_of_logits(F.linear(hidden, weight, bias), targets)`, the gradient computed along with the loss.

    Under autocast the products are in its dtype, all else is float32.

    Args:
        hidden: [rows, width].
        weight: [vocabulary, width].
        bias: [vocabulary] or None.
        targets: int64 [rows]; -100 where there is none.
    """
    device = hidden.device.type
    half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        apply: Any = _ChunkedLoss.apply
        loss: Tensor = apply(hidden, weight, bias, targets, half)
        return loss
    return _sweep(hidden, weight, bias, targets, half, (False, False, False))[0]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, half: torch.dtype | None
    ) -> Tensor:
        wanted = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
        loss, *gradients = _sweep(hidden, weight, bias, targets, half, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            # Scaled in float32: one over the tokens of an update has no room in fp16, a loss scale neither.
            None if gradient is None else (gradient.float() * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    half: torch.dtype | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The summed loss, and its gradients of hidden states, weight and bias where they are wanted."""
    vocabulary = weight.shape[0]
    head, added = _cast(weight, bias, half)
    hidden = hidden.to(head.dtype)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    of_head = torch.zeros_like(head, dtype=torch.float32) if wanted[1] else None
    of_bias = torch.zeros(vocabulary, dtype=torch.float32, device=hidden.device) if wanted[2] else None
    for begin, end in _chunks(len(hidden), len(head)):
        rows = hidden[begin:end]
        counts = (targets[begin:end] != IGNORE_INDEX)[:, None]
        aims = targets[begin:end].clamp_min(0)[:, None]
        logits = torch.mm(rows, head.t()) if added is None else torch.addmm(added, rows, head.t())
        logits[:, vocabulary:] = float("-inf")
        logits = logits.log_softmax(-1, dtype=torch.float32)
        loss = loss - torch.where(counts, logits.gather(1, aims), 0).sum()
        if not any(wanted):
            continue
        slope = _slope(logits, aims)
        if of_bias is not None:
            of_bias += torch.mv(slope[:, :vocabulary].t(), counts[:, 0].float())
        slope = slope.to(head.dtype)
        # Rows without a target are taken out where they are narrow.
        if of_hidden is not None:
            of_hidden[begin:end] = torch.mm(slope, head) * counts
        if of_head is not None:
            _add_product(of_head, slope.t(), rows * counts)
        # Else they would still be there beside the next chunk's.
        del logits, slope
    return loss, of_hidden, None if of_head is None else of_head[:vocabulary], of_bias


def _cast(weight: Tensor, bias: Tensor | None, half: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """The head in the products' dtype; where that makes a copy, its rows are filled up to a multiple of `_COLUMNS`."""
    if half is None:
        return weight, bias
    vocabulary, width = weight.shape
    padding = -vocabulary % _COLUMNS
    head = torch.cat([weight.to(half), weight.new_zeros(padding, width, dtype=half)])
    return head, None if bias is None else F.pad(bias.to(half), (0, padding))


def _slope(log_shares: Tensor, aims: Tensor) -> Tensor:
    """The gradient of the logits, in the logarithms' place if it can be: shares, less one at the aims."""
    if torch.compiler.is_compiling():  # which makes one kernel of it and what follows, but not of a scatter
        columns = torch.arange(log_shares.shape[1], device=log_shares.device)
        return log_shares.exp() - (columns == aims).float()
    return log_shares.exp_().scatter_add_(1, aims, torch.full_like(aims, -1, dtype=torch.float32))


# One operator to a compiler: it would keep the products of all chunks, to add them at once.
@torch.library.custom_op("llm::add_product", mutates_args=("total",))
def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds a product to a float32 matrix in place; of the left factor no number is larger than 1."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.dtype == torch.float16:
        # A token that stands in many rows would leave fp16's range, and no loss scale could help: it comes later.
        most = right.abs().amax().float() * right.shape[0]
        scale = torch.exp2((most / _FP16_ROOM).log2().ceil()).clamp_min(1)
        total.addcmul_(torch.mm(left, (right / scale).to(right.dtype)).float(), scale)
    else:
        total += torch.mm(left, right)


def _chunks(num_rows: int, vocabulary: int) -> list[tuple[int, int]]:
    """Equal ranges of rows, each with at most `_CHUNK_BYTES` of logits."""
    number = max(1, -(-num_rows * vocabulary * 4 // _CHUNK_BYTES))
    length = -(-num_rows // number)
    return [(begin, min(begin + length, num_rows)) for begin in range(0, num_rows, length)]
