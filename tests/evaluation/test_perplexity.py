"""Loss, perplexity and bits per byte, weighted by tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from llm.evaluation.perplexity import evaluate
from llm.models.language_model import LanguageModel
from llm.tokenization import IGNORE_INDEX
from llm.tokenization.vocabulary import token_byte_counts


@dataclass
class Batch:
    ids: Tensor
    targets: Tensor
    positions: None = None


class Fixed(nn.Module):
    """A stand-in for a model: the loss of each target is the id at its position."""

    def forward(self, ids: Tensor, targets: Tensor, positions: None) -> tuple[Tensor, Tensor]:
        assert not self.training
        is_predicted = targets != IGNORE_INDEX
        return (ids * is_predicted).sum().float(), is_predicted.sum()


def _evaluate(model: nn.Module, batches: list[Batch], **changes: object):
    options = {
        "device": torch.device("cpu"),
        "token_bytes": None,
        "bytes_per_token": 2.0,
        "sum_over_ranks": lambda tensor: tensor,
    } | changes
    return evaluate(model, batches, **options)


def _batch(loss: int, targets: list[int]) -> Batch:
    return Batch(torch.full((1, len(targets)), loss), torch.tensor([targets]))


def test_evaluate_when_batches_differ_in_size_then_every_token_has_the_same_weight() -> None:
    result = _evaluate(Fixed(), [_batch(1, [0, 0, 0]), _batch(5, [0, IGNORE_INDEX, IGNORE_INDEX])])
    assert result.num_tokens == 4
    assert result.loss == pytest.approx((3 * 1 + 5) / 4)
    assert result.perplexity == pytest.approx(math.exp(2.0))
    assert result.bits_per_byte == pytest.approx(8 / math.log(2) / (4 * 2.0))


def test_evaluate_when_one_rank_without_bytes_then_the_loss_needs_no_more_arguments() -> None:
    result = evaluate(Fixed(), [_batch(3, [0, 0])], device=torch.device("cpu"), token_bytes=None)
    assert (result.loss, result.num_tokens) == (3.0, 2)
    assert math.isnan(result.bits_per_byte)


def test_evaluate_when_token_bytes_given_then_counts_bytes_of_targets() -> None:
    table = torch.tensor([0, 3, 1], dtype=torch.int32)
    result = _evaluate(Fixed(), [_batch(2, [1, 2, 0, IGNORE_INDEX])], token_bytes=table)
    assert result.bits_per_byte == pytest.approx(3 * 2 / math.log(2) / 4)


def test_evaluate_when_real_model_then_loss_is_mean_cross_entropy(tiny_gpt2: PreTrainedModel, byte_tokenizer) -> None:
    rows = torch.randint(0, 256, (5, 33))
    table = torch.from_numpy(token_byte_counts(byte_tokenizer))
    batches = [Batch(rows[:3, :-1], rows[:3, 1:]), Batch(rows[3:, :-1], rows[3:, 1:])]
    result = _evaluate(LanguageModel(tiny_gpt2), batches, token_bytes=table)
    tiny_gpt2.eval()
    with torch.no_grad():
        logits = tiny_gpt2(rows[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-5)
    assert result.num_tokens == 5 * 32


def test_evaluate_when_ranks_differ_then_sums_over_ranks() -> None:
    other = torch.tensor([30.0, 6.0, 0.0], dtype=torch.float64)
    result = _evaluate(Fixed(), [_batch(1, [0, 0])], sum_over_ranks=lambda mine: mine + other)
    assert result.loss == pytest.approx(32 / 8)
    assert result.num_tokens == 8


def test_evaluate_when_rank_has_no_batch_then_uses_sums_of_other_ranks() -> None:
    other = torch.tensor([6.0, 3.0, 0.0], dtype=torch.float64)
    assert _evaluate(Fixed(), [], sum_over_ranks=lambda mine: mine + other).loss == 2.0


def test_evaluate_when_no_token_on_any_rank_then_raises() -> None:
    with pytest.raises(ValueError, match="no rank had a token"):
        _evaluate(Fixed(), [])


def test_evaluate_when_loss_is_huge_then_perplexity_is_infinite() -> None:
    assert _evaluate(Fixed(), [_batch(10_000, [0])]).perplexity == math.inf


@pytest.mark.parametrize("training", [False, True])
def test_evaluate_when_done_then_mode_is_restored(training: bool) -> None:
    model = Fixed().train(training)
    _evaluate(model, [_batch(1, [0])])
    assert model.training == training


def test_evaluate_when_stopped_then_requests_no_further_batch_and_returns_none() -> None:
    answers = iter([False, False, True])
    requested = []

    def batches() -> Iterator[Batch]:
        for number in range(10):
            requested.append(number)
            yield _batch(1, [0])

    assert _evaluate(Fixed(), batches(), should_stop=lambda: next(answers)) is None
    assert requested == [0, 1, 2]


def test_evaluate_when_a_rank_has_no_more_text_then_a_batch_without_targets_changes_nothing() -> None:
    batches = [_batch(1, [0]), _batch(3, [0])]
    assert _evaluate(Fixed(), [*batches, _batch(7, [-100, -100])]) == _evaluate(Fixed(), batches)


def test_evaluate_when_stop_comes_after_last_batch_then_returns_result() -> None:
    answers = iter([False, False])
    result = _evaluate(Fixed(), [_batch(1, [0]), _batch(1, [0])], should_stop=lambda: next(answers, True))
    assert result.num_tokens == 2
