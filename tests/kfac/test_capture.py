"""What is captured: every backward pass, once, of a step with a factor update."""

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


def new_model() -> Mlp:
    torch.manual_seed(3)
    return Mlp(linear(True))


def factors(kfac: KFACPreconditioner) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in kfac.state_dict().items() if "/factor" in name or "/count" in name}


def backward(model: nn.Module, seed: int = 0) -> None:
    x, targets = data(seed)
    (loss_sum(model, x, targets) / (targets != -100).sum()).backward()


def have_same_factors(kfac: KFACPreconditioner, other: KFACPreconditioner, tolerance: float = 0.0) -> bool:
    pairs = zip(factors(kfac).values(), factors(other).values(), strict=True)
    return all(torch.allclose(one, two, rtol=tolerance, atol=tolerance * two.abs().max()) for one, two in pairs)


def test_capture_when_passes_need_no_gradients_then_they_are_not_captured() -> None:
    model, plain = new_model(), new_model()
    kfac, reference = KFACPreconditioner(model), KFACPreconditioner(plain)
    x, targets = data(9)
    with torch.no_grad():
        loss_sum(model, x, targets)
    loss_sum(model, x, targets)  # no backward
    model.eval()
    loss_sum(model, x, targets).backward()
    model.train()
    model.zero_grad()
    for network, preconditioner in ((model, kfac), (plain, reference)):
        backward(network)
        preconditioner.step()
    assert have_same_factors(kfac, reference)


def test_step_when_no_pass_was_captured_then_the_error_names_causes() -> None:
    model = new_model().eval()
    kfac = KFACPreconditioner(model)
    backward(model)
    with pytest.raises(RuntimeError, match="is the model in training mode"):
        kfac.step()


def test_capture_when_no_factor_update_is_due_then_adds_nothing_to_the_graph() -> None:
    model = new_model()
    kfac = KFACPreconditioner(model, factor_update_steps=3)
    x, _ = data(0)
    has_capture = []
    for seed in range(4):
        output = model.head(x.new_zeros(2, 9))
        has_capture.append("CaptureInBackward" in type(output.grad_fn).__name__)
        backward(model, seed)
        kfac.step()
        model.zero_grad()
    assert has_capture == [True, False, False, True]
    assert factors(kfac)["fc/count"] == 2


def test_capture_when_discarded_then_the_factors_do_not_change_and_the_step_is_repeated() -> None:
    model, plain = new_model(), new_model()
    kfac, reference = KFACPreconditioner(model, factor_update_steps=2), KFACPreconditioner(plain, factor_update_steps=2)
    before = factors(kfac)
    x, targets = data(1)
    loss_sum(model, x * float("nan"), targets).backward()
    kfac.discard()
    assert all(torch.equal(before[name], tensor) for name, tensor in factors(kfac).items())
    model.zero_grad()
    for network, preconditioner in ((model, kfac), (plain, reference)):
        backward(network)
        preconditioner.step()
    assert kfac.state_dict()["step"] == 1
    assert have_same_factors(kfac, reference)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_capture_when_a_pass_is_not_finite_then_the_factors_do_not_change(poison: float) -> None:
    model = new_model()
    kfac = KFACPreconditioner(model, factor_update_steps=1)
    backward(model)
    kfac.step()
    before = factors(kfac)
    model.zero_grad()
    x, targets = data(1)
    loss_sum(model, x, targets).mul(poison).backward()
    kfac.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in factors(kfac).items())
    model.zero_grad()
    backward(model)
    kfac.step()
    assert factors(kfac)["fc/count"] == 2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_capture_when_under_gradient_checkpointing_then_every_pass_counts_once(reentrant: bool) -> None:
    torch.manual_seed(3)
    plain = Block(linear(True))
    model = copy.deepcopy(plain)
    model.reentrant = reentrant
    kfac, reference = KFACPreconditioner(model), KFACPreconditioner(plain)
    for network, preconditioner in ((model, kfac), (plain, reference)):
        for seed in range(2):
            backward(network, seed)
        preconditioner.step()
    assert have_same_factors(kfac, reference)


def test_capture_when_under_bfloat16_then_the_factors_are_float32_and_close() -> None:
    model, plain = new_model(), new_model()
    kfac, reference = KFACPreconditioner(model), KFACPreconditioner(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backward(model)
        kfac.step()
    backward(plain)
    reference.step()
    assert all(tensor.dtype == torch.float32 for tensor in factors(kfac).values())
    assert have_same_factors(kfac, reference, 0.05)
    assert not have_same_factors(kfac, reference, 1e-5)


def test_capture_when_a_gradient_scaler_is_used_then_the_factors_are_those_without_it() -> None:
    model, plain = new_model(), new_model()
    kfac, reference = KFACPreconditioner(model), KFACPreconditioner(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, targets = data(0)
    num_tokens = int((targets != -100).sum())
    scaler.scale(loss_sum(model, x, targets) / num_tokens).backward()
    scaler.unscale_(optimizer)
    kfac.step(num_tokens=num_tokens, loss_scale=scaler.get_scale())
    backward(plain)
    reference.step(num_tokens=num_tokens)
    assert have_same_factors(kfac, reference, 1e-6)


def test_capture_when_a_layer_is_called_twice_then_both_calls_count() -> None:
    layer = nn.Linear(3, 3)
    kfac = KFACPreconditioner(layer)
    x = torch.randn(10, 3)
    layer(torch.tanh(layer(x))).square().sum().backward()
    kfac.step()
    ones = torch.cat([x, torch.ones(10, 1)], 1)
    twice = torch.cat([ones, torch.cat([torch.tanh(x @ layer.weight.T + layer.bias), torch.ones(10, 1)], 1)])
    values = kfac.state_dict()["/values_a"]
    torch.testing.assert_close(values, torch.linalg.eigvalsh(twice.T @ twice / 20), rtol=1e-4, atol=1e-5)


def test_capture_when_the_model_is_copied_then_the_copy_is_not_captured() -> None:
    model, plain = new_model(), new_model()
    kfac, reference = KFACPreconditioner(model), KFACPreconditioner(plain)
    backward(copy.deepcopy(model), seed=5)
    for network, preconditioner in ((model, kfac), (plain, reference)):
        backward(network)
        preconditioner.step()
    assert have_same_factors(kfac, reference)


def test_preconditioner_when_closed_then_the_model_has_no_hooks() -> None:
    model = new_model()
    kfac = KFACPreconditioner(model)
    kfac.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_factor_tokens_when_given_then_the_factors_are_close_to_those_of_all_tokens() -> None:
    preconditioners = []
    for tokens in (96, 96, None):
        model = new_model()
        kfac = KFACPreconditioner(model, factor_tokens=tokens, accumulation_steps=2)
        x, targets = data(0, rows=64)
        for rows in (slice(32), slice(32, 64)):
            (loss_sum(model, x[rows], targets[rows]) / 384).backward()
        kfac.step(num_tokens=384)
        preconditioners.append(kfac)
    some, again, everything = preconditioners
    assert have_same_factors(some, again)
    assert not have_same_factors(some, everything, 1e-3)
    assert have_same_factors(some, everything, 0.5)


class CountingBackend:
    """A torch.compile backend that only counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("reentrant", [None, False])
def test_compiled_when_trained_then_has_two_graphs_and_the_same_factors(reentrant: bool | None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(3)
    plain = Block(linear(True))
    model = copy.deepcopy(plain)
    model.reentrant = reentrant
    counting = CountingBackend()
    pair = []
    for network, backend in ((model, counting), (plain, None)):
        kfac = KFACPreconditioner(network, factor_update_steps=2)
        run = torch.compile(network, backend=backend, fullgraph=True) if backend else network
        pair.append((network, run, kfac))
    for step in range(6):
        for network, run, kfac in pair:
            x, targets = data(step)
            logits = run(x)
            nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            kfac.step()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.05 * parameter.grad
            network.zero_grad()
    assert counting.graphs == 2  # with captures, and without
    assert have_same_factors(pair[0][2], pair[1][2], 1e-5)


def test_compiled_when_ahead_of_time_then_has_the_same_factors_and_gradients() -> None:
    torch._dynamo.reset()
    model, plain = new_model(), new_model()
    kfac, reference = KFACPreconditioner(model), KFACPreconditioner(plain)
    for run, preconditioner in ((torch.compile(model, backend="aot_eager", fullgraph=True), kfac), (plain, reference)):
        x, targets = data(0)
        nn.functional.cross_entropy(run(x).flatten(0, 1), targets.flatten()).backward()
        preconditioner.step()
    assert have_same_factors(kfac, reference, 1e-6)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_preconditioner_when_it_has_no_references_then_it_is_freed_and_captures_nothing() -> None:
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


def test_backward_when_called_after_the_step_then_is_not_captured() -> None:
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
