"""What is captured and what is not: one look at every real backward pass of an update that wants it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llm.kfac import KFACPreconditioner
from llm.kfac.capture import _CAPTURES
from tests.kfac.models import Block, Mlp, data, linear, loss_sum


def fresh() -> Mlp:
    torch.manual_seed(3)
    return Mlp(linear(True))


def factors(kfac: KFACPreconditioner) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in kfac.state_dict().items() if "/factor" in name or "/count" in name}


def learn(model: nn.Module, seed: int = 0) -> None:
    x, targets = data(seed)
    (loss_sum(model, x, targets) / (targets != -100).sum()).backward()


def same(kfac: KFACPreconditioner, other: KFACPreconditioner, tolerance: float = 0.0) -> bool:
    pairs = zip(factors(kfac).values(), factors(other).values(), strict=True)
    return all(torch.allclose(one, two, rtol=tolerance, atol=tolerance * two.abs().max()) for one, two in pairs)


def test_capture_when_passes_need_no_gradients_then_they_leave_nothing() -> None:
    model, plain = fresh(), fresh()
    kfac, reference = KFACPreconditioner(model), KFACPreconditioner(plain)
    x, targets = data(9)
    with torch.no_grad():
        loss_sum(model, x, targets)
    loss_sum(model, x, targets)  # no backward
    model.eval()
    loss_sum(model, x, targets).backward()
    model.train()
    model.zero_grad()
    for each, preconditioner in ((model, kfac), (plain, reference)):
        learn(each)
        preconditioner.step()
    assert same(kfac, reference)


def test_capture_when_no_pass_was_seen_then_says_why() -> None:
    model = fresh().eval()
    kfac = KFACPreconditioner(model)
    learn(model)
    with pytest.raises(RuntimeError, match="is the model in training mode"):
        kfac.step()


def test_capture_when_none_is_due_then_adds_nothing_to_the_graph() -> None:
    model = fresh()
    kfac = KFACPreconditioner(model, factor_update_steps=3)
    x, _ = data(0)
    taps = []
    for seed in range(4):
        output = model.head(x.new_zeros(2, 9))
        taps.append("CaptureInBackward" in type(output.grad_fn).__name__)
        learn(model, seed)
        kfac.step()
        model.zero_grad()
    assert taps == [True, False, False, True]
    assert factors(kfac)["fc/count"] == 2


def test_capture_when_discarded_then_the_factors_do_not_change_and_the_update_is_made_again() -> None:
    model, plain = fresh(), fresh()
    kfac, reference = KFACPreconditioner(model, factor_update_steps=2), KFACPreconditioner(plain, factor_update_steps=2)
    before = factors(kfac)
    x, targets = data(1)
    loss_sum(model, x * float("nan"), targets).backward()
    kfac.discard()
    assert all(torch.equal(before[name], tensor) for name, tensor in factors(kfac).items())
    model.zero_grad()
    for each, preconditioner in ((model, kfac), (plain, reference)):
        learn(each)
        preconditioner.step()
    assert kfac.state_dict()["step"] == 1
    assert same(kfac, reference)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_capture_when_it_is_not_finite_then_the_factors_do_not_change(poison: float) -> None:
    model = fresh()
    kfac = KFACPreconditioner(model, factor_update_steps=1)
    learn(model)
    kfac.step()
    before = factors(kfac)
    model.zero_grad()
    x, targets = data(1)
    loss_sum(model, x, targets).mul(poison).backward()
    kfac.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in factors(kfac).items())
    model.zero_grad()
    learn(model)
    kfac.step()
    assert factors(kfac)["fc/count"] == 2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_capture_when_checkpointed_then_every_pass_counts_once(reentrant: bool) -> None:
    torch.manual_seed(3)
    plain = Block(linear(True))
    model = copy.deepcopy(plain)
    model.reentrant = reentrant
    kfac, reference = KFACPreconditioner(model), KFACPreconditioner(plain)
    for each, preconditioner in ((model, kfac), (plain, reference)):
        for seed in range(2):
            learn(each, seed)
        preconditioner.step()
    assert same(kfac, reference)


def test_capture_when_under_bfloat16_then_the_factors_are_float32_and_near() -> None:
    model, plain = fresh(), fresh()
    kfac, reference = KFACPreconditioner(model), KFACPreconditioner(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learn(model)
        kfac.step()
    learn(plain)
    reference.step()
    assert all(tensor.dtype == torch.float32 for tensor in factors(kfac).values())
    assert same(kfac, reference, 0.05)
    assert not same(kfac, reference, 1e-5)


def test_capture_when_a_gradient_scaler_is_at_work_then_the_factors_are_those_without_it() -> None:
    model, plain = fresh(), fresh()
    kfac, reference = KFACPreconditioner(model), KFACPreconditioner(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, targets = data(0)
    num_tokens = int((targets != -100).sum())
    scaler.scale(loss_sum(model, x, targets) / num_tokens).backward()
    scaler.unscale_(optimizer)
    kfac.step(num_tokens=num_tokens, loss_scale=scaler.get_scale())
    learn(plain)
    reference.step(num_tokens=num_tokens)
    assert same(kfac, reference, 1e-6)


def test_capture_when_a_layer_is_used_twice_then_both_uses_count() -> None:
    layer = nn.Linear(3, 3)
    kfac = KFACPreconditioner(layer)
    x = torch.randn(10, 3)
    layer(torch.tanh(layer(x))).square().sum().backward()
    kfac.step()
    ones = torch.cat([x, torch.ones(10, 1)], 1)
    twice = torch.cat([ones, torch.cat([torch.tanh(x @ layer.weight.T + layer.bias), torch.ones(10, 1)], 1)])
    kept = kfac.state_dict()["/values_a"]
    torch.testing.assert_close(kept, torch.linalg.eigvalsh(twice.T @ twice / 20), rtol=1e-4, atol=1e-5)


def test_capture_when_the_model_was_copied_then_the_copy_leaves_nothing() -> None:
    model, plain = fresh(), fresh()
    kfac, reference = KFACPreconditioner(model), KFACPreconditioner(plain)
    learn(copy.deepcopy(model), seed=5)
    for each, preconditioner in ((model, kfac), (plain, reference)):
        learn(each)
        preconditioner.step()
    assert same(kfac, reference)


def test_capture_when_closed_then_the_model_is_as_it_was() -> None:
    model = fresh()
    kfac = KFACPreconditioner(model)
    kfac.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_factor_tokens_when_given_then_so_many_rows_are_taken_and_the_factors_near() -> None:
    kept = []
    for tokens in (96, 96, None):
        model = fresh()
        kfac = KFACPreconditioner(model, factor_tokens=tokens, accumulation_steps=2)
        x, targets = data(0, rows=64)
        for rows in (slice(32), slice(32, 64)):
            (loss_sum(model, x[rows], targets[rows]) / 384).backward()
        kfac.step(num_tokens=384)
        kept.append(kfac)
    some, again, whole = kept
    assert same(some, again)
    assert not same(some, whole, 1e-3)
    assert same(some, whole, 0.5)


class Counting:
    """A compiler that only counts its graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("reentrant", [None, False])
def test_compiled_when_it_trains_then_has_two_graphs_and_the_same_numbers(reentrant: bool | None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(3)
    plain = Block(linear(True))
    model = copy.deepcopy(plain)
    model.reentrant = reentrant
    counting = Counting()
    pair = []
    for each, backend in ((model, counting), (plain, None)):
        kfac = KFACPreconditioner(each, factor_update_steps=2)
        run = torch.compile(each, backend=backend, fullgraph=True) if backend else each
        pair.append((each, run, kfac))
    for update in range(6):
        for each, run, kfac in pair:
            x, targets = data(update)
            logits = run(x)
            nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            kfac.step()
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter -= 0.05 * parameter.grad
            each.zero_grad()
    assert counting.graphs == 2  # with taps, and without
    assert same(pair[0][2], pair[1][2], 1e-5)


def test_compiled_when_by_the_ahead_of_time_compiler_then_has_the_same_numbers() -> None:
    torch._dynamo.reset()
    model, plain = fresh(), fresh()
    kfac, reference = KFACPreconditioner(model), KFACPreconditioner(plain)
    for run, preconditioner in ((torch.compile(model, backend="aot_eager", fullgraph=True), kfac), (plain, reference)):
        x, targets = data(0)
        nn.functional.cross_entropy(run(x).flatten(0, 1), targets.flatten()).backward()
        preconditioner.step()
    assert same(kfac, reference, 1e-6)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_preconditioner_when_nobody_holds_it_then_it_is_gone_and_captures_nothing_more() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    gc.collect()
    before = len(_CAPTURES)
    gc.disable()
    try:
        kfac = KFACPreconditioner(model)
        model(torch.ones(2, 4)).sum().backward()
        assert len(_CAPTURES) == before + 2
        del kfac
        assert len(_CAPTURES) == before
        model(torch.ones(2, 4)).sum().backward()
    finally:
        gc.enable()


def test_backward_when_it_comes_after_its_step_then_is_not_captured() -> None:
    model = nn.Linear(4, 4)
    kfac = KFACPreconditioner(model, factor_update_steps=10)
    early, late = (model(torch.full((2, 4), value)).sum() for value in (1.0, 9.0))
    early.backward()
    kfac.step()
    factor = kfac.state_dict()["/factor_a"]
    late.backward()
    kfac.step()
    assert all(capture.num_rows == 0 for group in kfac._groups for capture in group.captures)
    assert torch.equal(kfac.state_dict()["/factor_a"], factor)
