"""What stands between the backward passes and the clipping: K-FAC's, and that of a stand-in for kfac-pytorch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
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

from llm.config.errors import UserError
from llm.config.options import KfacOptions, OptimizerOptions
from llm.data.batches.loader import Batch
from llm.distributed.world import World
from llm.models.language_model import LanguageModel
from llm.optim.registry import build_optimizer
from llm.training.accelerator import Compute
from llm.training.updaters.base import LoadedState, StepVotes
from llm.training.updaters.kfac_pytorch import KfacPytorchPreconditioner
from llm.training.updaters.preconditioning import KfacPreconditioner, Preconditioner, chunked_lm_heads, kfac_bytes
from llm.training.updaters.synchronous import SynchronousUpdater

RATE = 0.1


class Fragile(LanguageModel):
    """`poison` is added to every summed loss, and to its gradient."""

    poison = 0.0

    def forward(self, ids: Tensor, targets: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loss, count = super().forward(ids, targets, positions)
        return loss * (1 + self.poison), count


def updater_of(
    model: PreTrainedModel, *, scale: float | None = None, max_grad_norm: float = 0.0, **options: Any
) -> SynchronousUpdater:
    """Plain gradient descent behind K-FAC, which looks and refreshes in every update; fp16's scaler at `scale`."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale is not None else None
    accelerator: Any = SimpleNamespace(
        scaler=scaler,
        backward=lambda loss: (loss if scaler is None else scaler.scale(loss)).backward(),
        no_sync=lambda _: nullcontext(),
    )
    sgd = OptimizerOptions(optim="sgd", adam_beta1=0.0, learning_rate=RATE)
    optimizer = build_optimizer(model, sgd)
    chosen = KfacOptions(**{"kfac": True, "kfac_factor_update_steps": 1, "kfac_inv_update_steps": 1} | options)
    language_model = Fragile(model)
    return SynchronousUpdater(
        compute=Compute(accelerator, World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))),
        model=language_model,
        wrapped=language_model,
        optimizer=optimizer,
        schedule=lambda step: 1.0,
        max_grad_norm=max_grad_norm,
        seed=5,
        preconditioner=KfacPreconditioner(
            model, chosen, learning_rate=lambda: optimizer.param_groups[0]["lr"], accumulation=2, tokens_per_step=96
        ),
    )


def batches(number: int) -> list[Batch]:
    """Two micro-batches, others for every number."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(257, (2, 3, 17), generator=draw)
    return [Batch(each[:, :-1], each[:, 1:]) for each in ids]


@pytest.mark.parametrize("what", ["poison", "stop"])
def test_update_when_it_is_not_made_then_the_next_one_is_as_if_it_had_not_been(
    what: str, tiny_gpt2: GPT2LMHeadModel
) -> None:
    updater = updater_of(tiny_gpt2)
    updater.update(batches(0), 0)
    before = updater.state()
    weights = {name: t.clone() for name, t in tiny_gpt2.state_dict().items()}
    if what == "poison":
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
    made = {name: t.clone() for name, t in tiny_gpt2.state_dict().items()}
    tiny_gpt2.load_state_dict(weights)
    other = updater_of(tiny_gpt2)
    other.load(LoadedState({name: part.tensor for name, part in before.tensors.items()}, before.numbers))
    other.update(batches(3), 2)
    assert all(torch.equal(made[name], tensor) for name, tensor in tiny_gpt2.state_dict().items())


def changes(model: GPT2LMHeadModel, **options: Any) -> dict[str, Tensor]:
    """What one update makes of the weights, which are as before afterwards."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    updater_of(model, **options).update(batches(0), 0)
    found = {name: t - before[name] for name, t in model.state_dict().items()}
    model.load_state_dict(before)
    return found


def test_fp16_when_its_scale_is_another_then_lengths_stay(tiny_gpt2: GPT2LMHeadModel) -> None:
    # kfac-pytorch's formulas depend on the size of the gradients that a loss scale multiplies.
    plain = changes(tiny_gpt2, kfac_compat=True)
    for scale in (1.0, 1024.0):
        scaled = changes(tiny_gpt2, kfac_compat=True, scale=scale)
        for name, change in plain.items():
            torch.testing.assert_close(scaled[name], change, rtol=1e-4, atol=1e-7)


def test_clipping_when_kfac_changed_the_norm_then_is_of_what_it_left(tiny_gpt2: GPT2LMHeadModel) -> None:
    limit = 0.01
    for options in ({}, {"kfac_kl_clip": 1e9}):
        updater = updater_of(tiny_gpt2, max_grad_norm=limit, **options)
        before = [parameter.detach().clone() for parameter in updater._parameters]
        report = updater.update(batches(0), 0)
        moved = nn.utils.get_total_norm([p.detach() - b for p, b in zip(updater._parameters, before, strict=True)])
        assert float(moved) == pytest.approx(RATE * limit, rel=1e-3)
        assert float(report.grad_norm) > limit


def test_rate_when_it_begins_at_zero_then_the_clip_divides_by_something(tiny_gpt2: GPT2LMHeadModel) -> None:
    updater = updater_of(tiny_gpt2, kfac_kl_clip=0.001)
    updater._schedule = lambda step: float(step)
    assert not updater.update(batches(0), 0).skipped
    assert all(torch.isfinite(parameter).all() for parameter in tiny_gpt2.parameters())


def test_wish_for_a_checkpoint_when_a_rank_has_one_then_is_in_the_report(tiny_gpt2: GPT2LMHeadModel) -> None:
    updater = updater_of(tiny_gpt2)
    assert updater.update(batches(0), 0, votes=StepVotes(save=lambda: True)).votes.save
    assert not updater.update(batches(0), 1).votes.save


def test_head_when_its_loss_is_computed_by_chunks_then_is_left_alone() -> None:
    for vocab_size, number in ((97, 15), (3000, 14)):
        made = KfacPreconditioner(
            _llama(vocab_size), KfacOptions(kfac=True), learning_rate=lambda: RATE, accumulation=1, tokens_per_step=1000
        )
        taken, left, *_ = made.summary()
        assert taken.startswith(f"K-FAC: {number} layers")
        assert ("lm_head (" in left) == (number == 14)


def test_head_when_its_logits_are_scaled_then_it_is_called_and_taken() -> None:
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


def test_bytes_when_asked_then_are_those_of_the_state(tiny_gpt2: GPT2LMHeadModel) -> None:
    options = KfacOptions(kfac=True, kfac_method="inverse")
    tensors, _ = KfacPreconditioner(
        tiny_gpt2, options, learning_rate=lambda: RATE, accumulation=1, tokens_per_step=1000
    ).state()
    assert kfac_bytes(tiny_gpt2.config, options)[1] == sum(tensor.nbytes for tensor in tensors.values())
    assert kfac_bytes(tiny_gpt2.config, KfacOptions()) == (0, 0)


# An installed kfac-pytorch.


def _llama(vocab_size: int = 97) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=False, **sizes))


class StandIn:
    """The surface of kfac.preconditioner.KFACPreconditioner 0.4: it doubles the gradients, and counts."""

    def __init__(self, model: nn.Module, **given: Any) -> None:
        self.model = model
        self.given = given
        self.steps = 0
        self.num_resets = 0
        self.layers: dict[str, dict[str, Tensor | None]] = {"a.b": {"A": torch.eye(2), "G": None}}

    def step(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 2
        self.steps += 1

    def reset_batch(self) -> None:
        self.num_resets += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "damping": 1.0, "layers": self.layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.layers = state["layers"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[KfacPytorchPreconditioner, StandIn]]:
    """Ours around the stand-in, and the stand-in."""
    made: list[StandIn] = []

    def make(model: nn.Module, **given: Any) -> StandIn:
        made.append(StandIn(model, **given))
        return made[-1]

    package, module = ModuleType("kfac"), ModuleType("kfac.preconditioner")
    module.KFACPreconditioner = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kfac", package)
    monkeypatch.setitem(sys.modules, "kfac.preconditioner", module)

    def build(model: PreTrainedModel, **options: Any) -> tuple[KfacPytorchPreconditioner, StandIn]:
        chosen = KfacOptions(**{"kfac": True, "kfac_backend": "kfac-pytorch", **options})
        return KfacPytorchPreconditioner(model, chosen, learning_rate=lambda: 0.0, accumulation=3, scaler=None), made[
            -1
        ]

    return build


def test_kfac_pytorch_when_installed_then_is_driven_between_backward_and_clipping(
    installed: Callable[..., tuple[KfacPytorchPreconditioner, StandIn]],
) -> None:
    model = _llama()
    one, inner = installed(model, kfac_damping=0.01, kfac_inv_update_steps=7)
    assert {key: inner.given[key] for key in ("factor_update_steps", "inv_update_steps", "damping")} == {
        "factor_update_steps": 10, "inv_update_steps": 7, "damping": 0.01,
    }  # fmt: skip
    assert "kl_clip" not in inner.given  # its own default
    assert (inner.given["accumulation_steps"], inner.given["compute_method"]) == (3, "eigen")
    assert not inner.given["update_factors_in_hook"]
    assert inner.given["lr"](0) > 0
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = torch.tensor(float(sum(p.numel() for p in model.parameters()))).sqrt()
    found = one.precondition(norm, num_tokens=torch.tensor(8), loss_scale=torch.tensor(1.0))
    assert float(found) == pytest.approx(2 * float(norm))
    one.discard()
    assert inner.num_resets == 1
    other: Preconditioner
    other, second = installed(model)
    other.load(*one.state())
    assert second.steps == 1
    assert torch.equal(second.layers["a.b"]["A"], torch.eye(2))  # type: ignore[arg-type]
    assert second.layers["a.b"]["G"] is None
    with pytest.raises(ValueError, match="another --kfac_backend"):
        KfacPreconditioner(
            model, KfacOptions(kfac=True), learning_rate=lambda: 0.0, accumulation=1, tokens_per_step=1000
        ).load(*one.state())


def test_kfac_pytorch_when_the_model_has_no_layer_for_it_then_is_refused(
    installed: Callable[..., tuple[KfacPytorchPreconditioner, StandIn]], tiny_gpt2: GPT2LMHeadModel
) -> None:
    with pytest.raises(UserError, match="Conv1D"):
        installed(tiny_gpt2)
    with pytest.raises(UserError, match="no Linear layer"):
        installed(_llama(), kfac_skip_layers=("Linear",))


def test_kfac_pytorch_when_not_installed_then_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kfac", None)
    options = KfacOptions(kfac=True, kfac_backend="kfac-pytorch")
    with pytest.raises(UserError, match=r"not installed here.*git\+https://github\.com/gpauloski/kfac-pytorch"):
        KfacPytorchPreconditioner(_llama(), options, learning_rate=lambda: 0.0, accumulation=1, scaler=None)
