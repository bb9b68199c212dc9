"""Muon against torch's own, against the mathematics, and one model written in two ways."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import llm.optim.muon as muon
from llm.config.errors import UserError
from llm.config.options import OptimizerOptions
from llm.optim.groups import hidden_matrices, muon_groups
from llm.optim.muon import Muon, MuonWithAdamW, orthogonalized
from llm.optim.registry import build_optimizer

SHAPES = {"square": (24, 24), "wide": (16, 64), "tall": (64, 16), "little wide": (24, 30)}
OPTIONS = OptimizerOptions(optim="muon", learning_rate=3e-3, muon_learning_rate=0.05, weight_decay=0.1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[False, True], ids=["fp32", "bf16"])
def natively_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the device is taken for one that multiplies bf16."""
    monkeypatch.setattr(muon, "multiplies_bf16", lambda _: request.param)
    return bool(request.param)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_orthogonal_when_computed_then_keeps_the_singular_vectors_and_evens_the_values(
    shape: tuple[int, int], natively_bf16: bool
) -> None:
    # Singular values from 1 to 1/100.
    u, _, v = torch.linalg.svd(drawn(*shape), full_matrices=False)
    values = torch.logspace(0, -2, min(shape))
    (found,) = orthogonalized([7.0 * (u * values) @ v])
    assert found.shape == shape
    assert found.dtype == (torch.bfloat16 if natively_bf16 else torch.float32)
    inside = u.T @ found.float() @ v.T
    assert float(inside.diagonal().min()) > 0.6
    assert float(inside.diagonal().max()) < 1.25
    assert float((inside - inside.diagonal().diag()).abs().max()) < (0.15 if natively_bf16 else 1e-3)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_orthogonal_when_long_rows_have_a_low_rank_then_the_shorter_form_is_the_long_one(rank: int) -> None:
    matrix = drawn(32, max(rank, 1)) @ drawn(max(rank, 1), 128, seed=1) * (rank > 0)
    x = matrix[None]
    x = x / x.norm().clamp(min=1e-7)
    found = muon._newton_schulz_of_squares(x)[0]
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    torch.testing.assert_close(found, x[0], atol=1e-4, rtol=0)


def test_orthogonal_when_matrices_are_together_then_each_is_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "multiplies_bf16", lambda _: False)
    matrices = [drawn(*shape, seed=seed) for seed, shape in enumerate([*SHAPES.values()] * 3)]
    alone = [orthogonalized([matrix])[0] for matrix in matrices]
    for numbers in (1, 2000, 1 << 20):  # one at a time, some, all of a shape
        monkeypatch.setattr(muon, "_BATCH_NUMBERS", numbers)
        for one, together in zip(alone, orthogonalized(matrices), strict=True):
            torch.testing.assert_close(together, one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_muon_when_stepping_then_is_torchs(shape: tuple[int, int], natively_bf16: bool) -> None:
    ours, theirs = (nn.Parameter(drawn(*shape)) for _ in range(2))
    before = ours.detach().clone()
    mine = Muon([{"params": [ours], "weight_decay": 0.1}], lr=0.1, momentum=0.9)
    torchs = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(4):
        for weight, optimizer in ((ours, mine), (theirs, torchs)):
            weight.grad = drawn(*shape, seed=step + 1)
            optimizer.step()
    assert torch.equal(mine.state[ours]["momentum_buffer"], torchs.state[theirs]["momentum_buffer"])
    # Torch's iterates in bf16 whatever the device.
    ours, theirs = ours.detach(), theirs.detach()
    moved = (theirs - before).norm()
    assert float((ours - theirs).norm() / moved) < 0.03
    assert float(moved) > 1.0


def linear_twin(model: nn.Module) -> nn.Module:
    """The same model with every Conv1D written as a Linear."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight.data = module.weight.data.T.contiguous()
            linear.bias.data = module.bias.data.clone()
            twin.set_submodule(name, linear)
    return twin


def test_twin_when_conv1d_is_written_as_linear_then_the_updates_are_the_same(
    tiny_gpt2: GPT2LMHeadModel, natively_bf16: bool
) -> None:
    twin = linear_twin(tiny_gpt2)
    turned = hidden_matrices(twin)
    assert not any(turned.values())
    assert all(hidden_matrices(tiny_gpt2).values())
    before = {name: weight.detach().clone() for name, weight in tiny_gpt2.named_parameters()}
    optimizers = [(model, build_optimizer(model, OPTIONS)) for model in (tiny_gpt2, twin)]
    # The same gradients, so that what differs is the optimizer's.
    for step in range(3):
        for seed, (name, weight) in enumerate(tiny_gpt2.named_parameters()):
            weight.grad = drawn(*weight.shape, seed=100 * step + seed)
            other = twin.get_parameter(name)
            other.grad = (weight.grad.T if name in turned else weight.grad).clone()
        for _, optimizer in optimizers:
            optimizer.step()
    for name, weight in tiny_gpt2.named_parameters():
        other = twin.get_parameter(name)
        torch.testing.assert_close(other.T if name in turned else other, weight, atol=1e-6, rtol=1e-6)
        assert not torch.equal(weight, before[name])


def test_groups_when_gpt2_then_muon_has_the_blocks_matrices_alone(tiny_gpt2: PreTrainedModel) -> None:
    matrices, others = muon_groups(tiny_gpt2, 0.1)
    parts = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    (group,) = matrices
    assert {name for name, _ in group["params"]} == {f"transformer.h.{i}.{part}" for i in range(2) for part in parts}
    assert (group["inputs_first"], group["weight_decay"]) == (True, 0.1)
    tables = {"transformer.wte.weight", "transformer.wpe.weight"}
    assert [group["weight_decay"] for group in others] == [0.1, 0.0]
    assert {name for name, _ in others[0]["params"]} == tables
    assert sum(len(group["params"]) for group in (*matrices, *others)) == len(dict(tiny_gpt2.named_parameters()))


@pytest.mark.parametrize("tied", [False, True])
def test_groups_when_llama_then_neither_table_nor_head_is_muons(tied: bool) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    hidden = hidden_matrices(AutoModelForCausalLM.from_config(config))
    assert {name.split(".")[-2] for name in hidden} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }
    assert not any(hidden.values())


def test_groups_when_a_block_shares_its_weight_with_a_table_then_it_is_not_muons() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(4, 6, bias=False), nn.Linear(4, 4)])
    model.table = nn.Embedding(6, 4)
    model.table.weight = model.blocks[0].weight
    assert list(hidden_matrices(model)) == ["blocks.1.weight"]


def test_groups_when_frozen_or_marked_then_left_out_or_not_decayed() -> None:
    model = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])})
    model["h"][0].requires_grad_(False)
    model["h"][1].weight._no_weight_decay = True
    matrices, others = muon_groups(model, 0.1)
    assert ([name for name, _ in matrices[0]["params"]], matrices[0]["weight_decay"]) == (["h.1.weight"], 0.0)
    assert (len(matrices), others) == (1, [])
    # Muon alone then.
    optimizer = build_optimizer(model, OPTIONS)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.05]


def test_optimizer_when_muon_then_each_group_has_its_peak(tiny_gpt2: PreTrainedModel) -> None:
    optimizer = build_optimizer(tiny_gpt2, OPTIONS)
    assert type(optimizer) is MuonWithAdamW
    assert optimizer.defaults["lr"] == 3e-3
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.05, 3e-3, 3e-3]
    assert [len(group["param_names"]) for group in optimizer.param_groups] == [
        len(group["params"]) for group in optimizer.param_groups
    ]


def test_optimizer_when_the_rate_of_a_group_is_set_then_that_group_alone_moves(tiny_gpt2: PreTrainedModel) -> None:
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


def test_state_when_loaded_then_the_parts_go_on_with_it(tiny_gpt2: PreTrainedModel) -> None:
    other = copy.deepcopy(tiny_gpt2)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for seed, weight in enumerate(model.parameters()):
                weight.grad = drawn(*weight.shape, seed=1000 * step + seed)
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


def test_optimizer_when_no_matrix_is_muons_then_refuses_in_one_line() -> None:
    with pytest.raises(UserError, match="use --optim adamw") as refusal:
        build_optimizer(nn.Linear(3, 2), OPTIONS)
    assert "\n" not in str(refusal.value)


def test_muon_when_given_a_closure_then_evaluates_it_with_gradients() -> None:
    weight = nn.Parameter(drawn(4, 4))
    before = weight.detach().clone()

    def closure() -> float:
        loss = (weight**2).sum()
        loss.backward()
        return float(loss.detach())

    assert Muon([{"params": [weight]}], lr=0.1, momentum=0.9).step(closure) == pytest.approx(float((before**2).sum()))
    assert not torch.equal(weight, before)
