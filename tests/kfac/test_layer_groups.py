"""Sums and factors of a stack of layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llm.kfac.capture import Capture, CaptureSwitch
from llm.kfac.decompositions import Inverse
from llm.kfac.formulas import Formulas
from llm.kfac.layer_groups import FactorSums, LayerGroup
from llm.kfac.layers import Layer, find_layers
from llm.kfac.packed_symmetric import unfold

CPU = torch.device("cpu")


def group_of(model: nn.Module, switch: CaptureSwitch, *, is_local: bool = True) -> LayerGroup:
    """The layers of the model, all of one shape, with offsets 0, 1/2, ..."""
    layers, _ = find_layers(model, None, 100)
    formulas = Formulas()

    def new_capture(layer: Layer, sums: Callable[[], tuple[Tensor, Tensor]]) -> Capture:
        return Capture(layer, switch, sums, row_weight=formulas.row_weight, max_rows=None)

    return LayerGroup(
        layers,
        [index / len(layers) for index in range(len(layers))],
        owner=0,
        is_local=is_local,
        formulas=formulas,
        decomposition=Inverse(formulas, torch.float32),
        factor_dtype=torch.float32,
        new_capture=new_capture,
    )


def two_layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])


def test_sums_when_a_layer_adds_to_its_views_then_they_are_in_the_buffer() -> None:
    sums = FactorSums(2, (4, 3), dtype=torch.float64, device=CPU)
    sum_a, sum_g = sums.of_layer(1)
    assert (sum_a.shape, sum_g.shape) == ((5, 2), (3, 2))
    sum_a += 1
    sum_g += 2
    buffer = sums.buffer()
    assert (buffer.dtype, buffer.shape) == (torch.float64, (2 * (10 + 6) + 4,))
    all_a, all_g, counts = sums.split(buffer)
    assert (all_a[0].sum(), all_a[1].sum(), all_g[0].sum(), all_g[1].sum()) == (0, 10, 0, 12)
    assert counts.shape == (2, 2)
    sums.release()
    assert not sums.buffer().any()


def test_accumulate_when_sums_are_added_then_the_factors_are_the_mean_of_the_rows() -> None:
    model, switch = two_layers(), CaptureSwitch()
    group = group_of(model, switch)
    switch.is_on = True
    x, gradient = torch.randn(5, 3), torch.randn(5, 2)
    model[0](x).backward(gradient)
    sums = group.take_sums()
    assert group.captures[0].num_rows == 0
    group.accumulate(sums, 0.95, num_tokens=10, loss_scale=2.0, world=1)
    a = torch.cat([x, torch.ones(5, 1)], 1)
    torch.testing.assert_close(unfold(group.state["factor_a"][0], 4), (a.T @ a / 5).tril())
    torch.testing.assert_close(unfold(group.state["factor_g"][0], 2), (10 / 4 * gradient.T @ gradient).tril())
    assert group.state["count"].tolist() == [1, 0]
    # The second layer saw no row: its factors are still the identity.
    assert torch.equal(unfold(group.state["factor_a"][1], 4), torch.eye(4))


def test_accumulate_when_one_layers_sums_are_not_finite_then_the_other_factors_change() -> None:
    model, switch = two_layers(), CaptureSwitch()
    group = group_of(model, switch)
    switch.is_on = True
    for layer, poison in zip(model, (float("nan"), 1.0), strict=True):
        layer(torch.ones(4, 3)).backward(torch.full((4, 2), poison))
    group.accumulate(group.take_sums(), 0.95, num_tokens=None, loss_scale=1.0, world=1)
    assert group.state["count"].tolist() == [0, 1]
    assert torch.equal(unfold(group.state["factor_g"][0], 2), torch.eye(2))
    assert torch.equal(unfold(group.state["factor_g"][1], 2), torch.full((2, 2), 16.0).tril())


def test_refresh_when_one_offset_is_due_then_only_that_layer_changes() -> None:
    group = group_of(two_layers(), CaptureSwitch())
    group.refresh(0.25, lambda offset: offset == 0.5)
    assert torch.equal(group.state["inverse_a"][0], torch.eye(4))
    torch.testing.assert_close(group.state["inverse_a"][1], torch.eye(4) / 1.5)


def test_gradients_when_written_back_then_are_the_same_in_each_layer() -> None:
    model = two_layers()
    group = group_of(model, CaptureSwitch())
    for layer in model:
        layer(torch.randn(5, 3)).sum().backward()
    stack = group.read_gradients()
    assert stack.shape == (2, 4, 2)
    assert stack.numel() == group.num_weights()
    assert torch.equal(stack[0, :3], model[0].weight.grad.T)
    assert torch.equal(stack[1, 3], model[1].bias.grad)
    group.write_gradients((2 * stack).flatten())
    assert torch.equal(group.read_gradients(), 2 * stack)


def test_state_when_another_rank_owns_the_group_then_is_empty() -> None:
    group = group_of(two_layers(), CaptureSwitch(), is_local=False)
    assert group.state == {}
    assert {name: tuple(stack.shape) for name, stack in group.empty_state().items()} == {
        "count": (2,), "factor_a": (2, 5, 2), "factor_g": (2, 3, 1), "inverse_a": (2, 4, 4), "inverse_g": (2, 2, 2),
    }  # fmt: skip
