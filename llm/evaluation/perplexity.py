"""Loss, perplexity and bits per byte of a model on batches of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from llm.tokenization import IGNORE_INDEX


class _Batch(Protocol):
    @property
    def ids(self) -> Tensor: ...

    @property
    def targets(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation, over the tokens of all ranks.

    Attributes:
        loss: mean loss per predicted token, in nats.
        perplexity: exp(loss); inf when that overflows a float.
        bits_per_byte: summed loss in bits, divided by the UTF-8 bytes of the predicted tokens; nan
            when there are no bytes.
        num_tokens: number of predicted tokens.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    num_tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[_Batch],
    *,
    device: torch.device,
    token_bytes: Tensor | None,
    bytes_per_token: float = 0.0,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate the model in eval mode; every token of every rank has the same weight.

    Call this function on all ranks together, each with its own batches. All ranks make the same number of forward
    passes, because a forward pass may gather weights that the ranks share. The function reads the device once, at the
    end, and restores the model's mode (train or eval).

    Args:
        model: `forward(ids, targets, positions) -> (loss_sum, num_tokens)`, both scalar tensors.
        batches: objects with the attributes `ids`, `targets` and `positions`, int64 [batch, block];
            `positions` may be None. A target of `IGNORE_INDEX` is not predicted, so that a rank that has no
            more text can take part with a batch of such targets.
        device: device of the model, on which tensors are also summed over ranks.
        token_bytes: int [vocab], number of UTF-8 bytes of each token; None: use `bytes_per_token`.
        bytes_per_token: mean number of bytes per token, used when `token_bytes` is None; with 0, the bits per byte are
            nan then.
        sum_over_ranks: returns the sum over all ranks of a float64 [3] tensor (float32 on MPS); needed if there are
            several ranks.
        should_stop: returns whether the ranks have agreed to stop; called before each batch, and it gives the same
            answers on all ranks.

    Returns:
        The result, the same on all ranks; None if they stopped early.

    Raises:
        ValueError: no rank had a token to predict.
    """
    table = None if token_bytes is None else token_bytes.to(device)
    training = model.training
    model.eval()
    try:
        sums = _sums_of_batches(model, batches, device, table, should_stop)
    finally:
        model.train(training)
    if sums is None:
        return None
    # float32 holds the counts of one batch exactly. Their sum over a long text needs float64, which MPS lacks.
    sum_dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros(3, dtype=sum_dtype, device=device)
    if sums:
        total += torch.stack(sums).to(sum_dtype).sum(0)
    loss_sum, num_tokens, num_bytes = sum_over_ranks(total).tolist()
    if num_tokens == 0:
        raise ValueError("evaluation: no rank had a token to predict; give at least one block of text")
    if table is None:
        num_bytes = num_tokens * bytes_per_token
    return _evaluation(loss_sum, num_tokens, num_bytes)


def _evaluation(loss_sum: float, num_tokens: float, num_bytes: float) -> Evaluation:
    loss = loss_sum / num_tokens
    return Evaluation(
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=loss_sum / math.log(2) / num_bytes if num_bytes else math.nan,
        num_tokens=round(num_tokens),
    )


def _sums_of_batches(
    model: nn.Module,
    batches: Iterable[_Batch],
    device: torch.device,
    table: Tensor | None,
    should_stop: Callable[[], bool],
) -> list[Tensor] | None:
    """Sums of each batch, float32 [3] each; None if the ranks stopped before the last batch."""
    sums: list[Tensor] = []
    for batch in batches:
        if should_stop():
            return None
        sums.append(_sums(model, batch, device, table))
    return sums


def _sums(model: nn.Module, batch: _Batch, device: torch.device, table: Tensor | None) -> Tensor:
    """Summed loss, number of tokens and number of bytes of one batch, float32 [3] on the device."""
    is_async = device.type == "cuda"
    ids = batch.ids.to(device, non_blocking=is_async)
    targets = batch.targets.to(device, non_blocking=is_async)
    positions = None if batch.positions is None else batch.positions.to(device, non_blocking=is_async)
    loss_sum, num_tokens = model(ids, targets, positions)
    num_bytes = torch.zeros((), device=device)
    if table is not None:
        num_bytes = (table[targets.clamp_min(0)] * (targets != IGNORE_INDEX)).sum()
    return torch.stack([loss_sum.float(), num_tokens.float(), num_bytes.float()])


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
