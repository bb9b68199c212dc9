"""Muon against torch.optim.Muon, against the mathematics, and one model in two layouts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import llm.optim.muon as muon
from llm.config.errors import UserError
from llm.config.options import OptimizerOptions
from llm.optim.groups import hidden_matrices, muon_groups
from llm.optim.muon import Muon, MuonWithAdamW, orthogonalize
from llm.optim.registry import build_optimizer

SHAPES = {"square": (24, 24), "wide": (16, 64), "tall": (64, 16), "little wide": (24, 30)}
OPTIONS = OptimizerOptions(optim="muon", learning_rate=3e-3, muon_learning_rate=0.05, weight_decay=0.1)


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[False, True], ids=["fp32", "bf16"])
def is_native_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether Muon believes that the device multiplies bf16 natively."""
    monkeypatch.setattr(muon, "multiplies_bf16", lambda _: request.param)
    return bool(request.param)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_orthogonalize_when_called_then_keeps_the_singular_vectors_and_evens_the_values(
    shape: tuple[int, int], is_native_bf16: bool
) -> None:
    # Singular values from 1 to 1/100.
    u, _, v = torch.linalg.svd(random_tensor(*shape), full_matrices=False)
    values = torch.logspace(0, -2, min(shape))
    (result,) = orthogonalize([7.0 * (u * values) @ v])
    assert result.shape == shape
    assert result.dtype == (torch.bfloat16 if is_native_bf16 else torch.float32)
    core = u.T @ result.float() @ v.T  # diagonal, if the singular vectors are the same
    assert float(core.diagonal().min()) > 0.6
    assert float(core.diagonal().max()) < 1.25
    assert float((core - core.diagonal().diag()).abs().max()) < (0.15 if is_native_bf16 else 1e-3)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_newton_schulz_when_long_rows_have_a_low_rank_then_the_cheaper_form_gives_the_same(rank: int) -> None:
    matrix = torch.zeros(32, 128)
    if rank > 0:
        matrix = random_tensor(32, rank) @ random_tensor(rank, 128, seed=1)
    x = matrix[None]
    x = x / x.norm().clamp(min=1e-7)
    result = muon._newton_schulz_of_squares(x)[0]
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    torch.testing.assert_close(result, x[0], atol=1e-4, rtol=0)


def test_orthogonalize_when_matrices_are_batched_then_each_is_the_same_as_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(muon, "multiplies_bf16", lambda _: False)
    matrices = [random_tensor(*shape, seed=seed) for seed, shape in enumerate([*SHAPES.values()] * 3)]
    alone = [orthogonalize([matrix])[0] for matrix in matrices]
    for batch_numbers in (1, 2000, 1 << 20):  # one at a time, some, all of a shape
        monkeypatch.setattr(muon, "_BATCH_NUMBERS", batch_numbers)
        for one, together in zip(alone, orthogonalize(matrices), strict=True):
            torch.testing.assert_close(together, one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_muon_when_it_steps_then_agrees_with_torch(shape: tuple[int, int], is_native_bf16: bool) -> None:
    weight, reference = (nn.Parameter(random_tensor(*shape)) for _ in range(2))
    before = weight.detach().clone()
    optimizer = Muon([{"params": [weight], "weight_decay": 0.1}], lr=0.1, momentum=0.9)
    torch_muon = torch.optim.Muon([reference], lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(4):
        for parameter, muon_optimizer in ((weight, optimizer), (reference, torch_muon)):
            parameter.grad = random_tensor(*shape, seed=step + 1)
            muon_optimizer.step()
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch_muon.state[reference]["momentum_buffer"])
    # torch.optim.Muon iterates in bf16 on every device.
    distance = (reference.detach() - before).norm()
    assert float((weight.detach() - reference.detach()).norm() / distance) < 0.03
    assert float(distance) > 1.0


def linear_twin(model: nn.Module) -> nn.Module:
    """A copy of the model with every Conv1D replaced by a Linear with the same values."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight.data = module.weight.data.T.contiguous()
            linear.bias.data = module.bias.data.clone()
            twin.set_submodule(name, linear)
    return twin


def test_muon_when_conv1d_is_replaced_by_linear_then_the_updates_are_the_same(
    tiny_gpt2: GPT2LMHeadModel, is_native_bf16: bool
) -> None:
    twin = linear_twin(tiny_gpt2)
    transposed = hidden_matrices(twin)
    assert not any(transposed.values())
    assert all(hidden_matrices(tiny_gpt2).values())
    before = {name: weight.detach().clone() for name, weight in tiny_gpt2.named_parameters()}
    optimizers = [(model, build_optimizer(model, OPTIONS)) for model in (tiny_gpt2, twin)]
    # The same gradients for both, so that only the optimizer could make a difference.
    for step in range(3):
        for seed, (name, weight) in enumerate(tiny_gpt2.named_parameters()):
            weight.grad = random_tensor(*weight.shape, seed=100 * step + seed)
            other = twin.get_parameter(name)
            other.grad = (weight.grad.T if name in transposed else weight.grad).clone()
        for _, optimizer in optimizers:
            optimizer.step()
    for name, weight in tiny_gpt2.named_parameters():
        other = twin.get_parameter(name)
        torch.testing.assert_close(other.T if name in transposed else other, weight, atol=1e-6, rtol=1e-6)
        assert not torch.equal(weight, before[name])


def test_muon_groups_when_a_matrix_is_frozen_or_marked_then_it_is_left_out_or_does_not_decay() -> None:
    model = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])})
    model["h"][0].requires_grad_(False)
    model["h"][1].weight._no_weight_decay = True
    matrices, others = muon_groups(model, 0.1)
    assert ([name for name, _ in matrices[0]["params"]], matrices[0]["weight_decay"]) == (["h.1.weight"], 0.0)
    assert (len(matrices), others) == (1, [])
    # The optimizer is Muon alone then.
    optimizer = build_optimizer(model, OPTIONS)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.05]


def test_optimizer_when_muon_then_each_group_has_its_peak_rate(tiny_gpt2: PreTrainedModel) -> None:
    optimizer = build_optimizer(tiny_gpt2, OPTIONS)
    assert type(optimizer) is MuonWithAdamW
    assert optimizer.defaults["lr"] == 3e-3
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.05, 3e-3, 3e-3]
    assert [len(group["param_names"]) for group in optimizer.param_groups] == [
        len(group["params"]) for group in optimizer.param_groups
    ]


def test_optimizer_when_only_one_group_has_a_rate_then_only_that_group_changes(tiny_gpt2: PreTrainedModel) -> None:
    optimizer = build_optimizer(tiny_gpt2, OPTIONS.model_copy(update={"weight_decay": 0.0}))
    hidden = hidden_matrices(tiny_gpt2)
    for moving in ("muon", "adamw"):
        before = {name: weight.detach().clone() for name, weight in tiny_gpt2.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = 0.01 if ("inputs_first" in group) == (moving == "muon") else 0.0
        for weight in tiny_gpt2.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        changed = {name for name, weight in tiny_gpt2.named_parameters() if not torch.equal(weight, before[name])}
        assert changed == {name for name in before if (name in hidden) == (moving == "muon")}


def test_state_when_loaded_then_both_optimizers_continue_with_it(tiny_gpt2: PreTrainedModel) -> None:
    other = copy.deepcopy(tiny_gpt2)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for seed, weight in enumerate(model.parameters()):
                weight.grad = random_tensor(*weight.shape, seed=1000 * step + seed)
            optimizer.step()
            optimizer.zero_grad()

    first, second = (build_optimizer(model, OPTIONS) for model in (tiny_gpt2, other))
    train(tiny_gpt2, first, range(3))
    other.load_state_dict(tiny_gpt2.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert len(second.state) == len(list(other.parameters()))
    train(tiny_gpt2, first, range(3, 5))
    train(other, second, range(3, 5))
    assert all(torch.equal(one, two) for one, two in zip(tiny_gpt2.parameters(), other.parameters(), strict=True))


def test_optimizer_when_no_matrix_is_for_muon_then_the_error_is_one_line() -> None:
    with pytest.raises(UserError, match="use --optim adamw") as refusal:
        build_optimizer(nn.Linear(3, 2), OPTIONS)
    assert "\n" not in str(refusal.value)


def test_muon_when_step_has_a_closure_then_evaluates_it_with_gradients() -> None:
    weight = nn.Parameter(random_tensor(4, 4))
    before = weight.detach().clone()

    def closure() -> float:
        loss = (weight**2).sum()
        loss.backward()
        return float(loss.detach())

    assert Muon([{"params": [weight]}], lr=0.1, momentum=0.9).step(closure) == pytest.approx(float((before**2).sum()))
    assert not torch.equal(weight, before)
