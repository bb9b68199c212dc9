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
from llm.tokenization.load import bytes_of_tokens


@dataclass
class Batch:
    ids: Tensor
    targets: Tensor
    positions: None = None


class Fixed(nn.Module):
    """A stand-in whose loss is its first input for each target."""

    def forward(self, ids: Tensor, targets: Tensor, positions: None) -> tuple[Tensor, Tensor]:
        assert not self.training
        counts = targets != -100
        return (ids * counts).sum().float(), counts.sum()


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


def test_evaluate_when_batches_differ_in_size_then_every_token_weighs_alike() -> None:
    found = _evaluate(Fixed(), [_batch(1, [0, 0, 0]), _batch(5, [0, -100, -100])])
    assert found.num_tokens == 4
    assert found.loss == pytest.approx((3 * 1 + 5) / 4)
    assert found.perplexity == pytest.approx(math.exp(2.0))
    assert found.bits_per_byte == pytest.approx(8 / math.log(2) / (4 * 2.0))


def test_evaluate_when_table_is_given_then_counts_the_targets_bytes() -> None:
    table = torch.tensor([0, 3, 1], dtype=torch.int32)
    found = _evaluate(Fixed(), [_batch(2, [1, 2, 0, -100])], token_bytes=table)
    assert found.bits_per_byte == pytest.approx(3 * 2 / math.log(2) / 4)


def test_evaluate_when_real_model_then_is_the_mean_cross_entropy(tiny_gpt2: PreTrainedModel, byte_tokenizer) -> None:
    rows = torch.randint(0, 256, (5, 33))
    table = torch.from_numpy(bytes_of_tokens(byte_tokenizer))
    batches = [Batch(rows[:3, :-1], rows[:3, 1:]), Batch(rows[3:, :-1], rows[3:, 1:])]
    found = _evaluate(LanguageModel(tiny_gpt2), batches, token_bytes=table)
    tiny_gpt2.eval()
    with torch.no_grad():
        logits = tiny_gpt2(rows[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-5)
    assert found.num_tokens == 5 * 32


def test_evaluate_when_ranks_differ_then_adds_their_sums() -> None:
    other = torch.tensor([30.0, 6.0, 0.0, 0.0], dtype=torch.float64)
    found = _evaluate(Fixed(), [_batch(1, [0, 0])], sum_over_ranks=lambda mine: mine + other)
    assert found.loss == pytest.approx(32 / 8)
    assert found.num_tokens == 8


def test_evaluate_when_rank_has_no_batch_then_takes_part() -> None:
    other = torch.tensor([6.0, 3.0, 0.0, 0.0], dtype=torch.float64)
    assert _evaluate(Fixed(), [], sum_over_ranks=lambda mine: mine + other).loss == 2.0


def test_evaluate_when_no_token_anywhere_then_refuses() -> None:
    with pytest.raises(ValueError, match="at least one"):
        _evaluate(Fixed(), [])


def test_evaluate_when_loss_is_huge_then_perplexity_is_infinite() -> None:
    assert _evaluate(Fixed(), [_batch(10_000, [0])]).perplexity == math.inf


@pytest.mark.parametrize("training", [False, True])
def test_evaluate_when_done_then_mode_is_as_before(training: bool) -> None:
    model = Fixed().train(training)
    _evaluate(model, [_batch(1, [0])])
    assert model.training == training


def test_evaluate_when_asked_to_stop_then_no_further_batch_is_made_and_nothing_comes_out() -> None:
    asked = iter([False, False, True])
    made = []

    def batches() -> Iterator[Batch]:
        for number in range(10):
            made.append(number)
            yield _batch(1, [0])

    assert _evaluate(Fixed(), batches(), should_stop=lambda: next(asked)) is None
    assert made == [0, 1, 2]


def test_evaluate_when_another_rank_was_asked_to_stop_then_nothing_comes_out_here_either() -> None:
    other = torch.tensor([6.0, 3.0, 0.0, 1.0], dtype=torch.float64)
    assert _evaluate(Fixed(), [_batch(1, [0])], sum_over_ranks=lambda mine: mine + other) is None


def test_evaluate_when_the_stop_comes_after_the_last_batch_then_is_whole() -> None:
    asked = iter([False, False])
    found = _evaluate(Fixed(), [_batch(1, [0]), _batch(1, [0])], should_stop=lambda: next(asked, True))
    assert found.num_tokens == 2
