"""Preconditioners between the backward passes and the clipping."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from llm.config.options import KfacOptions, OptimizerOptions
from llm.data.batches.loader import Batch
from llm.distributed.world import World
from llm.models.language_model import LanguageModel
from llm.optim.registry import build_optimizer
from llm.training.accelerator import Compute
from llm.training.updaters.base import LoadedState, StepVotes
from llm.training.updaters.preconditioning import (
    KfacPreconditioner,
    NoPreconditioner,
    chunked_lm_heads,
    kfac_bytes,
    norm_of,
    update_intervals,
)
from llm.training.updaters.synchronous import SynchronousUpdater

RATE = 0.1


class Poisoned(LanguageModel):
    """`poison` is added to the factor of every summed loss, and so of its gradient."""

    poison = 0.0

    def forward(self, ids: Tensor, targets: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loss, count = super().forward(ids, targets, positions)
        return loss * (1 + self.poison), count


def updater_of(
    model: PreTrainedModel, *, scale: float | None = None, max_grad_norm: float = 0.0, **options: Any
) -> SynchronousUpdater:
    """Gradient descent after K-FAC with factor and inverse updates in every step; `scale` is that of fp16's scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale is not None else None
    accelerator: Any = SimpleNamespace(
        scaler=scaler,
        backward=lambda loss: (loss if scaler is None else scaler.scale(loss)).backward(),
        no_sync=lambda _: nullcontext(),
    )
    sgd = OptimizerOptions(optim="sgd", adam_beta1=0.0, learning_rate=RATE)
    optimizer = build_optimizer(model, sgd)
    kfac = KfacOptions(**{"kfac": True, "kfac_factor_update_steps": 1, "kfac_inv_update_steps": 1} | options)
    language_model = Poisoned(model)
    return SynchronousUpdater(
        compute=Compute(accelerator, World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))),
        model=language_model,
        wrapped=language_model,
        optimizer=optimizer,
        schedule=lambda step: 1.0,
        max_grad_norm=max_grad_norm,
        seed=5,
        preconditioner=KfacPreconditioner(
            model, kfac, learning_rate=lambda: optimizer.param_groups[0]["lr"], accumulation=2, tokens_per_step=96
        ),
    )


def batches(number: int) -> list[Batch]:
    """Return two micro-batches, which differ from number to number."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(257, (2, 3, 17), generator=draw)
    return [Batch(rows[:, :-1], rows[:, 1:]) for rows in ids]


@pytest.mark.parametrize("cause", ["poison", "stop"])
def test_update_when_skipped_or_abandoned_then_leaves_no_trace_in_later_updates(
    cause: str, tiny_gpt2: GPT2LMHeadModel
) -> None:
    updater = updater_of(tiny_gpt2)
    updater.update(batches(0), 0)
    before = updater.state()
    weights = {name: t.clone() for name, t in tiny_gpt2.state_dict().items()}
    if cause == "poison":
        updater.model.poison = float("nan")
        assert updater.update(batches(1), 1).skipped
        updater.model.poison = 0.0
    else:
        answers = iter([False, True])
        assert updater.update(
            [*batches(1), *batches(2)], 1, votes=StepVotes(stop=lambda: next(answers, True))
        ).abandoned
    after = updater.state()
    assert after.numbers == before.numbers
    assert all(torch.equal(after.tensors[name].tensor, part.tensor) for name, part in before.tensors.items())
    updater.update(batches(3), 2)
    expected = {name: t.clone() for name, t in tiny_gpt2.state_dict().items()}
    tiny_gpt2.load_state_dict(weights)
    other = updater_of(tiny_gpt2)
    other.load(LoadedState({name: part.tensor for name, part in before.tensors.items()}, before.numbers))
    other.update(batches(3), 2)
    assert all(torch.equal(expected[name], tensor) for name, tensor in tiny_gpt2.state_dict().items())


def changes(model: GPT2LMHeadModel, **options: Any) -> dict[str, Tensor]:
    """Return by how much one update changes each weight; the weights are restored."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    updater_of(model, **options).update(batches(0), 0)
    differences = {name: t - before[name] for name, t in model.state_dict().items()}
    model.load_state_dict(before)
    return differences


def test_fp16_when_the_loss_scale_differs_then_the_update_is_the_same(tiny_gpt2: GPT2LMHeadModel) -> None:
    # kfac-pytorch's formulas depend on the size of the gradients that a loss scale multiplies.
    plain = changes(tiny_gpt2, kfac_compat=True)
    for scale in (1.0, 1024.0):
        scaled = changes(tiny_gpt2, kfac_compat=True, scale=scale)
        for name, change in plain.items():
            torch.testing.assert_close(scaled[name], change, rtol=1e-4, atol=1e-7)


def test_clipping_when_kfac_changes_the_norm_then_clips_the_preconditioned_gradient(tiny_gpt2: GPT2LMHeadModel) -> None:
    limit = 0.01
    for options in ({}, {"kfac_kl_clip": 1e9}):
        updater = updater_of(tiny_gpt2, max_grad_norm=limit, **options)
        before = [parameter.detach().clone() for parameter in updater._parameters]
        report = updater.update(batches(0), 0)
        moved = nn.utils.get_total_norm([p.detach() - b for p, b in zip(updater._parameters, before, strict=True)])
        assert float(moved) == pytest.approx(RATE * limit, rel=1e-3)
        assert float(report.grad_norm) > limit


def test_learning_rate_when_it_begins_at_zero_then_the_kl_clip_does_not_divide_by_zero(
    tiny_gpt2: GPT2LMHeadModel,
) -> None:
    updater = updater_of(tiny_gpt2, kfac_kl_clip=0.001)
    updater._schedule = lambda step: float(step)
    assert not updater.update(batches(0), 0).skipped
    assert all(torch.isfinite(parameter).all() for parameter in tiny_gpt2.parameters())


def test_votes_when_a_checkpoint_is_requested_then_is_in_the_report(tiny_gpt2: GPT2LMHeadModel) -> None:
    updater = updater_of(tiny_gpt2)
    assert updater.update(batches(0), 0, votes=StepVotes(save=lambda: True)).votes.save
    assert not updater.update(batches(0), 1).votes.save


def _llama(vocab_size: int = 97) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=False, **sizes))


def test_output_layer_when_its_loss_is_computed_in_chunks_then_is_skipped() -> None:
    for vocab_size, number in ((97, 15), (3000, 14)):
        preconditioner = KfacPreconditioner(
            _llama(vocab_size), KfacOptions(kfac=True), learning_rate=lambda: RATE, accumulation=1, tokens_per_step=1000
        )
        layers, skipped, *_ = preconditioner.summary()
        assert layers.startswith(f"K-FAC: {number} layers")
        assert ("lm_head (" in skipped) == (number == 14)


def test_output_layer_when_its_logits_are_scaled_then_is_called_and_preconditioned() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = GraniteForCausalLM(GraniteConfig(vocab_size=3000, tie_word_embeddings=False, logits_scaling=8.0, **sizes))
    assert chunked_lm_heads(model) == []
    assert (
        KfacPreconditioner(
            model, KfacOptions(kfac=True), learning_rate=lambda: RATE, accumulation=1, tokens_per_step=1000
        )
        .summary()[0]
        .startswith("K-FAC: 15 layers")
    )


def test_kfac_bytes_when_estimated_then_are_those_of_the_state(tiny_gpt2: GPT2LMHeadModel) -> None:
    options = KfacOptions(kfac=True, kfac_method="inverse")
    tensors, _ = KfacPreconditioner(
        tiny_gpt2, options, learning_rate=lambda: RATE, accumulation=1, tokens_per_step=1000
    ).state()
    assert kfac_bytes(tiny_gpt2.config, options)[1] == sum(tensor.nbytes for tensor in tensors.values())
    assert kfac_bytes(tiny_gpt2.config, KfacOptions()) == (0, 0)


def test_no_preconditioner_when_used_then_keeps_gradients_and_has_no_state(log_lines: Callable[[], list[str]]) -> None:
    none = NoPreconditioner()
    norm = torch.tensor(2.5)
    assert none.precondition(norm, num_tokens=torch.tensor(8), loss_scale=torch.tensor(1.0)) is norm
    assert (none.state(), none.summary(), none.timings) == (({}, {}), [], None)
    none.load({}, {})
    assert log_lines() == []
    none.load({"A": torch.eye(2)}, {"step": 3})
    assert "this run has no --kfac" in log_lines()[0]


@pytest.mark.parametrize(("factors", "inverses", "period"), [(10, 10, 10), (4, 6, 12), (1, 7, 7)])
def test_intervals_when_factors_and_inverses_have_their_own_then_repeat_after_the_least_common_multiple(
    factors: int, inverses: int, period: int
) -> None:
    options = KfacOptions(kfac=True, kfac_factor_update_steps=factors, kfac_inv_update_steps=inverses)
    assert update_intervals(options) == (factors, period)


def test_norm_when_some_parameters_have_no_gradient_then_is_that_of_the_others() -> None:
    with_gradient = nn.Parameter(torch.zeros(2, 2))
    with_gradient.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert float(norm_of([with_gradient, nn.Parameter(torch.zeros(3))])) == 5.0
