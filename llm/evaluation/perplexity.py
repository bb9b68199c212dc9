"""Loss, perplexity and bits per byte of a model on batches of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

_IGNORED = -100


class _Batch(Protocol):
    @property
    def ids(self) -> Tensor: ...

    @property
    def targets(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: mean over the predicted tokens, nats.
        perplexity: exp(loss); inf when that is too large for a number.
        bits_per_byte: summed loss in bits over the UTF-8 bytes of the predicted tokens; nan
            without bytes.
        num_tokens: predicted tokens, over all ranks.
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
    bytes_per_token: float,
    sum_over_ranks: Callable[[Tensor], Tensor],
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluates the model in eval mode, weighting every token of every rank alike.

    All ranks call it together, each with its own batches, of which some rank may have none. The device is read once,
    at the end. The model's mode is left as it was. None comes out, everywhere, where some rank had to stop early.

    Args:
        model: `forward(ids, targets, positions) -> (loss_sum, num_tokens)`; not wrapped by DDP,
            whose forward waits for ranks that may have fewer batches.
        batches: things with `ids`, `targets` and `positions` (which may be None), int64 [batch,
            block]; a target of -100 is not predicted.
        device: where the model is, and where tensors are summed over ranks.
        token_bytes: int [vocab], UTF-8 bytes of each token; None to use `bytes_per_token`.
        bytes_per_token: mean bytes of a token, used without a table.
        sum_over_ranks: adds a float64 tensor (float32 on MPS) up over all ranks.
        should_stop: whether this rank was asked to stop; asked before each batch.

    Raises:
        ValueError: no rank had a token to predict.
    """
    table = None if token_bytes is None else token_bytes.to(device)
    training = model.training
    model.eval()
    try:
        sums, is_cut = _sums_of_batches(model, batches, device, table, should_stop)
    finally:
        model.train(training)
    # Each batch's counts fit float32 exactly; their sum over a long text needs float64, which MPS lacks.
    exact = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros(4, dtype=exact, device=device)
    if sums:
        total[:3] += torch.stack(sums).to(exact).sum(0)
    total[3] = is_cut
    loss_sum, num_tokens, num_bytes, num_cut = sum_over_ranks(total).tolist()
    if num_cut:
        return None
    if num_tokens == 0:
        raise ValueError("an evaluation needs at least one predicted token")
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
) -> tuple[list[Tensor], bool]:
    """The sums of each batch, and whether a stop came before the last one."""
    sums: list[Tensor] = []
    for batch in batches:
        if should_stop():
            return sums, True
        sums.append(_sums(model, batch, device, table))
    return sums, False


def _sums(model: nn.Module, batch: _Batch, device: torch.device, table: Tensor | None) -> Tensor:
    """float32 [3]: summed loss, tokens and bytes of one batch, left on the device."""
    ids = batch.ids.to(device, non_blocking=True)
    targets = batch.targets.to(device, non_blocking=True)
    positions = None if batch.positions is None else batch.positions.to(device, non_blocking=True)
    loss_sum, num_tokens = model(ids, targets, positions)
    num_bytes = torch.zeros((), device=device)
    if table is not None:
        num_bytes = (table[targets.clamp_min(0)] * (targets != _IGNORED)).sum()
    return torch.stack([loss_sum.float(), num_tokens.float(), num_bytes.float()])


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
