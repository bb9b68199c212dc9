"""One update against arithmetic by hand, in float64, with numpy.

The model is the smallest language model there is: row i of one matrix holds the logits of the token
after token i. The gradient of the mean cross entropy is then (softmax - one-hot) / tokens, summed over
the tokens, which numpy computes from its formula.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from llm.config.options import OptimizerOptions, TrainingOptions
from llm.data.batches.loader import Batch
from llm.distributed.world import World
from llm.optim.registry import build_optimizer
from llm.training.accelerator import Compute, start_compute
from llm.training.updaters.base import LoadedState, StepReport, StepVotes
from llm.training.updaters.synchronous import SynchronousUpdater

VOCABULARY = 11
RATE = 0.5


class Bigrams(nn.Module):
    """Logits of the next token, one row a token; `poison` is added to the summed loss."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.rows = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=draw))
        self.dropout = dropout
        self.poison = 0.0

    def forward(self, ids: Tensor, targets: Tensor, positions: None = None) -> tuple[Tensor, Tensor]:
        logits = F.dropout(self.rows[ids], self.dropout)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return loss + self.poison * self.rows.sum(), (targets != -100).sum()


class Deeper(Bigrams):
    """The same with a matrix in a block after it: Muon updates matrices inside blocks."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        torch.manual_seed(4)
        self.blocks = nn.ModuleList([nn.Linear(VOCABULARY, VOCABULARY)])

    def forward(self, ids: Tensor, targets: Tensor, positions: None = None) -> tuple[Tensor, Tensor]:
        logits = self.blocks[0](F.dropout(self.rows[ids], self.dropout))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return loss, (targets != -100).sum()


def batches(*shapes: tuple[int, int], ignored: float = 0.0) -> list[Batch]:
    """Return random micro-batches; a growing share of the targets, up to `ignored`, is ignored."""
    draw = torch.Generator().manual_seed(11)
    micro_batches = []
    for number, shape in enumerate(shapes, 1):
        ids = torch.randint(VOCABULARY, shape, generator=draw)
        targets = torch.randint(VOCABULARY, shape, generator=draw)
        share = ignored * number / len(shapes)
        micro_batches.append(Batch(ids, targets.masked_fill(torch.rand(shape, generator=draw) < share, -100)))
    return micro_batches


def expected(rows: Tensor, micro_batches: Sequence[Batch]) -> tuple[float, NDArray[np.float64]]:
    """Return loss and gradient of the mean over all tokens that are not ignored: float64, from the formula."""
    ids = np.concatenate([batch.ids.numpy().ravel() for batch in micro_batches])
    targets = np.concatenate([batch.targets.numpy().ravel() for batch in micro_batches])
    ids, targets = ids[targets != -100], targets[targets != -100]
    logits = rows.detach().numpy().astype(np.float64)[ids]
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    loss = -np.log(probabilities[np.arange(len(ids)), targets]).mean()
    probabilities[np.arange(len(ids)), targets] -= 1
    gradient = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(gradient, ids, probabilities / len(ids))
    return float(loss), gradient


@pytest.fixture(scope="module")
def compute() -> Compute:
    return start_compute(TrainingOptions(use_cpu=True, mixed_precision="no"))


def updater_of(compute: Compute, model: nn.Module, *, max_grad_norm: float = 0.0, **options: Any) -> SynchronousUpdater:
    """Gradient descent at RATE, without momentum, unless the options say otherwise."""
    values = {"optim": "sgd", "adam_beta1": 0.0, "learning_rate": RATE, **options}
    return SynchronousUpdater(
        compute=compute,
        model=model,
        wrapped=model,
        optimizer=build_optimizer(model, OptimizerOptions.model_validate(values)),
        schedule=lambda step: 1 / (step + 1),
        max_grad_norm=max_grad_norm,
        seed=5,
    )


def saved(updater: SynchronousUpdater) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return copies of the tensors and numbers that a checkpoint would hold."""
    state = updater.state()
    assert all(part.is_whole for part in state.tensors.values())
    return {name: part.tensor.clone() for name, part in state.tensors.items()}, state.numbers


def gradient_of(model: Bigrams, before: Tensor, rate: float = RATE) -> NDArray[np.float64]:
    """Return the gradient that a step of gradient descent used."""
    return ((before - model.rows.detach()) / rate).numpy().astype(np.float64)


SPLITS = {
    "one": [(12, 6)],
    "equal": [(3, 6)] * 4,
    "unequal": [(1, 6), (7, 6), (4, 6)],
}


@pytest.mark.parametrize("ignored", [0.0, 0.9])
@pytest.mark.parametrize("shapes", SPLITS.values(), ids=SPLITS)
def test_gradient_when_micro_batches_have_unequal_token_counts_then_is_that_of_the_mean_over_tokens(
    compute: Compute, shapes: list[tuple[int, int]], ignored: float
) -> None:
    model, micro_batches = Bigrams(), batches(*shapes, ignored=ignored)
    before = model.rows.detach().clone()
    loss, gradient = expected(before, micro_batches)
    report = updater_of(compute, model).update(micro_batches, 0)
    assert report.loss == pytest.approx(loss, rel=1e-6)
    assert float(report.grad_norm) == pytest.approx(np.linalg.norm(gradient), rel=1e-6)
    # The difference of two float32 weights near 1 carries their rounding.
    np.testing.assert_allclose(gradient_of(model, before), gradient, atol=1e-6)
    assert (report.lr, report.skipped, report.votes) == (RATE, False, (False, False))


def test_gradient_when_compared_with_the_mean_of_means_then_differs(compute: Compute) -> None:
    micro_batches = batches(*SPLITS["equal"], ignored=0.9)
    rows = Bigrams().rows
    mean_of_means = np.mean([expected(rows, [batch])[1] for batch in micro_batches], axis=0)
    _, gradient = expected(rows, micro_batches)
    # Otherwise the test above could not fail.
    assert np.linalg.norm(mean_of_means - gradient) > 0.1 * np.linalg.norm(gradient)


def test_gradient_when_one_micro_batch_has_no_target_then_is_that_of_the_others(compute: Compute) -> None:
    model, (one, other) = Bigrams(), batches((2, 6), (2, 6))
    before = model.rows.detach().clone()
    empty = Batch(other.ids, torch.full_like(other.targets, -100))
    loss, gradient = expected(before, [one])
    report = updater_of(compute, model).update([one, empty], 0)
    assert report.loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(gradient_of(model, before), gradient, atol=1e-6)


def test_gradient_when_there_are_two_ranks_then_each_divides_by_the_tokens_of_both(compute: Compute) -> None:
    mine, others = batches((2, 6), (3, 6), ignored=0.5)

    class TwoRanks(World):
        def all_reduce_sum(self, tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                tensor += (others.targets != -100).sum()
            return tensor

    model = Bigrams()
    before = model.rows.detach().clone()
    two = Compute(compute.accelerator, TwoRanks(rank=0, size=2, local_rank=0, device=torch.device("cpu")))
    updater_of(two, model).update([mine], 0)
    count = sum(int((batch.targets != -100).sum()) for batch in (mine, others))
    share = int((mine.targets != -100).sum()) / count
    # DDP would average over two ranks: half of this gradient is this rank's share of the sum over both.
    np.testing.assert_allclose(gradient_of(model, before) / 2, share * expected(before, [mine])[1], atol=1e-6)


@pytest.mark.parametrize("largest", [0.01, 1e3])
def test_clipping_when_the_norm_exceeds_the_limit_then_only_the_length_changes(
    compute: Compute, largest: float
) -> None:
    model, micro_batches = Bigrams(), batches((4, 6), (2, 6))
    before = model.rows.detach().clone()
    _, gradient = expected(before, micro_batches)
    norm = np.linalg.norm(gradient)
    report = updater_of(compute, model, max_grad_norm=largest).update(micro_batches, 0)
    assert float(report.grad_norm) == pytest.approx(norm, rel=1e-6)  # before clipping
    taken = gradient_of(model, before)
    np.testing.assert_allclose(taken, gradient * min(1.0, largest / norm), atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_update_when_the_gradient_is_not_finite_then_nothing_changes(compute: Compute, poison: float) -> None:
    model, micro_batches = Bigrams(), batches((4, 6), (2, 6))
    updater = updater_of(compute, model, optim="adamw", adam_beta1=0.9, weight_decay=0.1)
    updater.update(micro_batches, 0)
    before, state = model.rows.detach().clone(), updater.state()
    tensors = {name: part.tensor.clone() for name, part in state.tensors.items()}
    model.poison = poison
    report = updater.update(micro_batches, 1)
    assert report.skipped
    assert torch.equal(model.rows, before)
    assert all(torch.equal(part.tensor, tensors[name]) for name, part in updater.state().tensors.items())
    model.poison = 0.0
    assert not updater.update(micro_batches, 2).skipped
    assert torch.isfinite(model.rows).all()
    assert not torch.equal(model.rows, before)


def test_update_when_no_target_counts_at_all_then_is_skipped(compute: Compute) -> None:
    model, (batch,) = Bigrams(), batches((2, 6))
    before = model.rows.detach().clone()
    nothing = Batch(batch.ids, torch.full_like(batch.targets, -100))
    assert updater_of(compute, model).update([nothing], 0).skipped
    assert torch.equal(model.rows, before)


def test_update_when_some_were_made_then_the_heap_is_frozen(compute: Compute) -> None:
    gc.unfreeze()
    updater = updater_of(compute, Bigrams())
    for step, is_frozen in enumerate((False, False, True, True)):
        updater.update(batches((2, 5)), step)
        assert (gc.get_freeze_count() > 0) is is_frozen
    gc.unfreeze()


def test_update_when_a_stop_is_requested_before_it_then_is_made_and_reports_the_vote(compute: Compute) -> None:
    model, micro_batches = Bigrams(), batches((2, 6))
    before = model.rows.detach().clone()
    report = updater_of(compute, model).update(micro_batches, 0, votes=StepVotes(stop=lambda: True))
    assert report.votes is not None and report.votes.stop
    assert not report.abandoned
    assert not torch.equal(model.rows, before)


def test_update_when_a_stop_is_requested_between_micro_batches_then_is_abandoned(compute: Compute) -> None:
    class Counting(Bigrams):
        calls = 0

        def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
            self.calls += 1
            return super().forward(*inputs)

    model, micro_batches = Counting(), batches((2, 6), (2, 6), (2, 6), (2, 6))
    before = model.rows.detach().clone()
    updater = updater_of(compute, model)
    answers = iter([False, True])
    report = updater.update(micro_batches, 0, votes=StepVotes(stop=lambda: next(answers, True)))
    assert report.votes is not None and report.votes.stop
    assert report.abandoned
    assert not report.skipped
    assert model.calls == 2
    assert torch.equal(model.rows, before)
    # It leaves no trace: the same update made later equals the first update of a new updater.
    fresh = Bigrams()
    updater.update(micro_batches, 0)
    updater_of(compute, fresh).update(micro_batches, 0)
    assert torch.equal(model.rows, fresh.rows)


def test_learning_rate_when_the_step_advances_then_follows_the_schedule(compute: Compute) -> None:
    model, micro_batches = Bigrams(), batches((2, 6))
    updater = updater_of(compute, model)
    before = model.rows.detach().clone()
    _, gradient = expected(before, micro_batches)
    assert updater.update(micro_batches, 3).lr == RATE / 4
    np.testing.assert_allclose(gradient_of(model, before, RATE / 4), gradient, atol=1e-5)


@pytest.mark.parametrize("options", [{"optim": "adamw", "adam_beta1": 0.9}, {"optim": "sgd", "adam_beta1": 0.9}])
def test_state_when_loaded_into_another_then_continues_bit_identical(compute: Compute, options: dict[str, Any]) -> None:
    micro_batches = batches((4, 6), (3, 6), ignored=0.5)
    whole = Bigrams(dropout=0.2)
    first = updater_of(compute, whole, max_grad_norm=0.1, weight_decay=0.1, **options)
    for step in range(3):
        first.update(micro_batches, step)
    tensors, numbers = saved(first)
    assert tensors
    assert {name.split("/")[0] for name in tensors} == {"rows"}
    assert all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors.values())

    resumed = Bigrams(dropout=0.2)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in whole.state_dict().items()})
    second = updater_of(compute, resumed, max_grad_norm=0.1, weight_decay=0.1, **options)
    second.load(LoadedState(tensors, numbers))
    torch.rand(17)  # numbers drawn before a resume do not matter
    for step in range(3, 6):
        one, other = first.update(micro_batches, step), second.update(micro_batches, step)
        assert one.loss == other.loss
    assert torch.equal(whole.rows, resumed.rows)


MUON = {"optim": "muon", "adam_beta1": 0.9, "muon_learning_rate": 0.1, "weight_decay": 0.1}


def test_learning_rate_when_groups_have_different_peaks_then_they_share_the_schedule(compute: Compute) -> None:
    model = Deeper()
    updater = updater_of(compute, model, **MUON)
    assert updater.update(batches((2, 6)), 3).lr == RATE / 4
    rates = {name: group["lr"] for group in updater._optimizer.param_groups for name in group["param_names"]}
    assert rates == {"blocks.0.weight": 0.1 / 4, "rows": RATE / 4, "blocks.0.bias": RATE / 4}


def test_state_when_muon_is_loaded_into_another_then_continues_bit_identical(compute: Compute) -> None:
    micro_batches = batches((4, 6), (3, 6), ignored=0.5)
    whole, resumed = Deeper(dropout=0.2), Deeper(dropout=0.2)
    first, second = (updater_of(compute, model, max_grad_norm=0.1, **MUON) for model in (whole, resumed))
    for step in range(3):
        first.update(micro_batches, step)
    tensors, numbers = saved(first)
    moments = {f"{name}/{key}" for name in ("rows", "blocks.0.bias") for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(tensors) == {"blocks.0.weight/momentum_buffer", *moments}
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    resumed.load_state_dict({name: tensor.clone() for name, tensor in whole.state_dict().items()})
    second.load(LoadedState(tensors, numbers))
    for step in range(3, 6):
        one, other = first.update(micro_batches, step), second.update(micro_batches, step)
        assert one.loss == other.loss
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_state_when_of_another_model_then_is_refused(compute: Compute) -> None:
    updater = updater_of(compute, Bigrams(), optim="adamw")
    with pytest.raises(KeyError, match="columns"):
        updater.load(LoadedState({"columns/exp_avg": torch.zeros(1)}, updater.state().numbers))


@pytest.mark.parametrize(
    ("saved_by", "requested"), [("adamw", "sgd"), ("sgd", "adamw"), ("adamw", "muon"), ("muon", "adamw")]
)
def test_state_when_of_another_optimizer_then_is_refused(compute: Compute, saved_by: str, requested: str) -> None:
    first = updater_of(compute, Deeper(), optim=saved_by, adam_beta1=0.9)
    first.update(batches((2, 6)), 0)
    with pytest.raises((KeyError, ValueError)):
        updater_of(compute, Deeper(), optim=requested, adam_beta1=0.9).load(LoadedState(*saved(first)))


# The loss scaler of fp16, which also runs on a CPU.


def scaled(scale: float = 1024.0) -> Compute:
    """Return a stand-in accelerator with a loss scaler; the real one has a scaler on CUDA devices only."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator = SimpleNamespace(
        scaler=scaler,
        backward=lambda loss: scaler.scale(loss).backward(),
        no_sync=lambda _: nullcontext(),
    )
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    return Compute(accelerator, world)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"optim": "adamw", "adam_beta1": 0.9}, MUON], ids=["adamw", "muon"])
def test_scaler_when_the_gradient_is_finite_then_the_update_equals_the_unscaled_one(
    compute: Compute, options: dict[str, Any]
) -> None:
    micro_batches = batches((4, 6), (2, 6), ignored=0.5)
    plain, other = Deeper(), Deeper()
    reports: list[StepReport] = []
    for parts, model in ((compute, plain), (scaled(), other)):
        updater = updater_of(parts, model, max_grad_norm=0.1, **options)
        reports.append(updater.update(micro_batches, 0))
    assert reports[0].loss == reports[1].loss
    assert torch.equal(reports[0].grad_norm, reports[1].grad_norm)
    # A power of two scales without rounding.
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), other.parameters(), strict=True))


def test_scaler_when_the_gradient_overflows_then_halves_and_the_weights_stay() -> None:
    model, micro_batches = Bigrams(), batches((4, 6))
    before = model.rows.detach().clone()
    compute = scaled()
    updater = updater_of(compute, model, optim="adamw", adam_beta1=0.9)
    for scale in (512.0, 256.0):
        model.poison = float("inf")
        assert updater.update(micro_batches, 0).skipped
        assert torch.equal(model.rows, before)
        assert updater.state().numbers["scaler"]["scale"] == scale
    model.poison = 0.0
    assert not updater.update(micro_batches, 0).skipped
    assert updater.state().numbers["scaler"]["scale"] == 256.0
    assert not torch.equal(model.rows, before)


def test_scaler_when_resumed_then_keeps_its_scale() -> None:
    model, micro_batches = Bigrams(), batches((4, 6))
    first = updater_of(scaled(), model)
    model.poison = float("inf")
    first.update(micro_batches, 0)
    second = updater_of(scaled(), Bigrams())
    second.load(LoadedState(*saved(first)))
    assert second.state().numbers == first.state().numbers
    assert second.state().numbers["scaler"]["scale"] == 512.0
