"""The directions against the dense definition, and what they may not depend on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.kfac import KFACPreconditioner
from tests.kfac.models import Block, Mlp, conv1d, data, linear, loss_sum
from tests.kfac.oracle import Oracle, gradient_of, observe

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Mlp(linear(True)),
    "mlp_without_bias": lambda: Mlp(linear(False)),
    "linear": lambda: Block(linear(True)),
    "linear_without_bias": lambda: Block(linear(False)),
    "linear_checkpointed": lambda: Block(linear(True), reentrant=False),
    "linear_checkpointed_reentrant": lambda: Block(linear(False), reentrant=True),
    "conv1d": lambda: Block(conv1d),
    "conv1d_checkpointed": lambda: Block(conv1d, reentrant=False),
}
SPLITS = {"one": [8], "four": [3, 1, 2, 2]}


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]()


def losses(seed: int, split: Sequence[int], scale: float = 1.0) -> tuple[list[Callable[[nn.Module], Tensor]], int]:
    """The passes of one update, of so many rows each, that sum to the mean loss; and its tokens."""
    x, targets = data(seed, sum(split))
    num_tokens = int((targets != -100).sum())
    parts = zip(x.split(list(split)), targets.split(list(split)), strict=True)
    return [lambda model, p=p: loss_sum(model, *p) * (scale / num_tokens) for p in parts], num_tokens


def worst(kfac_model: nn.Module, expected: dict[str, Tensor]) -> float:
    """The largest relative error of a layer's direction."""
    layers = dict(kfac_model.named_modules())
    errors = {
        name: ((gradient_of(layers[name]).double() - direction).norm() / direction.norm()).item()
        for name, direction in expected.items()
    }
    return max(errors.values())


def descend(model: nn.Module, rate: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * parameter.grad / parameter.grad.norm()
    model.zero_grad()


def run(name: str, split: Sequence[int], oracle: Oracle, num_updates: int = 6, **arguments: Any) -> list[float]:
    """Trains with the directions; the worst relative error of every update."""
    model = make(name)
    kfac = KFACPreconditioner(model, accumulation_steps=len(split), **arguments)
    errors = []
    for update in range(num_updates):
        passes, num_tokens = losses(update, split)
        expected = oracle.directions(*observe(model, passes), num_tokens)
        for loss in passes:
            loss(model).backward()
        kfac.step(num_tokens=num_tokens)
        errors.append(worst(model, expected))
        descend(model, 0.05)
    return errors


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", MODELS)
def test_directions_when_inverses_are_fresh_and_stale_then_are_those_of_the_dense_product(
    name: str, split: list[int], power: float
) -> None:
    oracle = Oracle(power=power, factor_steps=2, inv_steps=5)  # factors at 0, 2, 4, inverses at 0, 1, 2, 4, 5
    errors = run(name, split, oracle, factor_update_steps=2, inv_update_steps=5, power=power, rescale=None)
    assert max(errors) < 1e-5


@pytest.mark.parametrize("method", ["eigen", "inverse"])
def test_directions_when_refreshes_are_spread_then_each_layer_has_those_of_its_own_update(method: str) -> None:
    # The dearest layer comes first: 8^3 + 9^3, 10^3 + 5^3 and 9^3 + 7^3, of 3,438 together.
    oracle = Oracle(split=method == "inverse", inv_steps=4, late={"proj": 0, "head": 1, "fc": 2})
    arguments = {"factor_update_steps": 1, "inv_update_steps": 4, "stagger": True, "method": method, "rescale": None}
    assert max(run("mlp", [8], oracle, 11, **arguments)) < 1e-5


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", ["mlp", "linear_without_bias", "conv1d_checkpointed"])
def test_directions_when_by_inverses_then_are_those_of_the_product_of_the_damped_factors(
    name: str, split: list[int]
) -> None:
    oracle = Oracle(split=True, inv_steps=3)
    arguments = {"factor_update_steps": 1, "inv_update_steps": 3, "method": "inverse", "rescale": None}
    assert max(run(name, split, oracle, **arguments)) < 1e-5


@pytest.mark.parametrize("method", ["eigen", "inverse"])
@pytest.mark.parametrize("split", [[8], [2, 2, 2, 2]], ids=["one", "four"])
@pytest.mark.parametrize("name", ["mlp", "linear", "conv1d"])
def test_directions_when_compatible_then_are_those_of_kfac_pytorch(name: str, split: list[int], method: str) -> None:
    oracle = Oracle(damping=1e-3, factor_steps=2, inv_steps=4, split=method == "inverse", anchor=True)
    model = make(name)
    kfac = KFACPreconditioner(
        model, factor_update_steps=2, inv_update_steps=4, compat="kfac-pytorch", method=method, lr=0.1,
        accumulation_steps=len(split),
    )  # fmt: skip
    shortened = 0
    for update in range(6):
        passes, num_tokens = losses(update, split)
        seen, gradients = observe(model, passes)
        expected = oracle.directions(seen, gradients, num_tokens)
        product = sum((expected[name] * gradients[name]).sum() for name in expected) * 0.1**2
        length = min(1.0, (1e-3 / abs(float(product))) ** 0.5)
        shortened += length < 1
        for loss in passes:
            loss(model).backward()
        kfac.step()
        assert worst(model, {name: length * direction for name, direction in expected.items()}) < 1e-5
        descend(model, 0.05)
    assert shortened > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["eigen", "inverse"])
def test_directions_when_gradients_are_the_same_then_a_conv1d_has_the_same_bits_as_its_linear_twin(
    method: str, bias: bool
) -> None:
    layer, twin = conv1d(12, 40), nn.Linear(12, 40)
    for each in (layer, twin):
        each.bias.requires_grad_(bias)
    pair = [KFACPreconditioner(each, method=method) for each in (layer, twin)]
    for _ in range(3):
        x, gradient = torch.randn(50, 12), torch.randn(50, 40)
        for each in (layer, twin):
            each.zero_grad()
            each(x).backward(gradient)
        twin.weight.grad.copy_(layer.weight.grad.T)  # whose products torch rounds in another order
        for kfac in pair:
            kfac.step()
        assert torch.equal(layer.weight.grad, twin.weight.grad.T)
        assert not bias or torch.equal(layer.bias.grad, twin.bias.grad)


# In float32 the two models' own rounding, 1e-7 of their gradients, is magnified where the curvature is weak.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 5e-6)])
@pytest.mark.parametrize("method", ["eigen", "inverse"])
def test_directions_when_of_a_conv1d_model_then_are_those_of_its_linear_twin(
    method: str, dtype: torch.dtype, bound: float
) -> None:
    model, twin = make("conv1d").to(dtype), make("linear").to(dtype)
    arguments: dict[str, Any] = {"method": method, "factor_dtype": dtype, "inv_dtype": dtype}
    pair = [(each, KFACPreconditioner(each, factor_update_steps=1, **arguments)) for each in (model, twin)]
    for update in range(4):
        twin.load_state_dict({name: w.T if w.ndim == 2 else w for name, w in model.state_dict().items()})
        passes, num_tokens = losses(update, [8])
        for each, kfac in pair:
            passes[0](each).backward()
            kfac.step(num_tokens=num_tokens)
        wanted = {n: gradient_of(layer).double() for n, layer in twin.named_modules() if type(layer) is nn.Linear}
        assert len(wanted) == 5
        assert worst(model, wanted) < bound
        descend(model, 0.05)
        twin.zero_grad()


def test_directions_when_the_loss_is_scaled_or_its_batch_repeated_then_are_the_same() -> None:
    made = []
    for scale, repeats in ((1.0, 1), (1024.0, 1), (1.0, 3)):
        model = make("linear")
        kfac = KFACPreconditioner(model, factor_update_steps=1, rescale=None)
        passes, num_tokens = losses(0, [8], scale)
        for _ in range(repeats):
            (passes[0](model) / repeats).backward()
        for parameter in model.parameters():
            parameter.grad /= scale
        kfac.step(num_tokens=repeats * num_tokens, loss_scale=torch.tensor(scale))
        made.append({n: gradient_of(m).double() for n, m in model.named_modules() if type(m) is nn.Linear})
    for other in made[1:]:
        for name, direction in made[0].items():
            assert (other[name] - direction).norm() < 1e-5 * direction.norm()


def test_directions_when_rescaled_then_have_their_gradients_norms() -> None:
    model = make("linear")
    kfac = KFACPreconditioner(model)
    passes, num_tokens = losses(0, [8])
    passes[0](model).backward()
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    before = [gradient_of(layer) for layer in layers]
    kfac.step(num_tokens=num_tokens)
    for old, layer in zip(before, layers, strict=True):
        new = gradient_of(layer)
        torch.testing.assert_close(new.norm(), old.norm())
        assert torch.cosine_similarity(new.flatten(), old.flatten(), 0) < 0.99


def test_directions_when_a_layer_was_never_seen_then_are_its_gradients() -> None:
    model = make("mlp")
    kfac = KFACPreconditioner(model, factor_update_steps=2)
    passes, num_tokens = losses(0, [8])
    with torch.no_grad():
        model.head.weight.zero_()  # so that no gradient reaches the layers before it
    passes[0](model).backward()
    kfac.step(num_tokens=num_tokens)
    model.zero_grad()
    with torch.no_grad():
        model.head.weight.normal_()
    passes[0](model).backward()
    before = gradient_of(model.fc)
    kfac.step(num_tokens=num_tokens)
    torch.testing.assert_close(gradient_of(model.fc), before)


def test_arguments_when_functions_of_the_update_then_are_asked_for_each() -> None:
    fixed, moving = make("mlp"), make("mlp")
    asked: list[int] = []

    def damping(step: int) -> float:
        asked.append(step)
        return 0.1

    pair = [
        (fixed, KFACPreconditioner(fixed, factor_update_steps=2, inv_update_steps=3)),
        (moving, KFACPreconditioner(
            moving, factor_update_steps=lambda _: 2, inv_update_steps=lambda _: 3, damping=damping,
            factor_decay=lambda _: 0.95,
        )),
    ]  # fmt: skip
    for update in range(5):
        passes, num_tokens = losses(update, [8])
        for model, kfac in pair:
            passes[0](model).backward()
            kfac.step(num_tokens=num_tokens)
            descend(model, 0.05)
    assert asked == list(range(5))
    for one, other in zip(fixed.parameters(), moving.parameters(), strict=True):
        assert torch.equal(one, other)


def test_loop_of_the_docs_when_run_then_learns_and_leaves_out_a_bad_batch() -> None:
    text = (Path(__file__).parents[2] / "docs/optimizers.md").read_text()
    (loop,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    model = make("mlp")
    x, targets = data(0, 8)
    good, bad = (x, targets), (x * float("nan"), targets)
    names: dict[str, Any] = {
        "KFACPreconditioner": KFACPreconditioner, "torch": torch, "model": model, "batches": [good, bad, *[good] * 20],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.5),
        "loss_of": lambda scores, ids: nn.functional.cross_entropy(scores.flatten(0, 1), ids.flatten()),
    }  # fmt: skip
    before = names["loss_of"](model(x), targets).item()
    exec(loop, names)  # noqa: S102 - our own
    assert names["loss_of"](model(x), targets).item() < 0.9 * before
    assert names["kfac"].state_dict()["step"] == 21


@pytest.mark.parametrize("arguments", [{"kl_clip": 1e-3, "rescale": None}, {"compat": "kfac-pytorch"}])
def test_clip_when_a_warm_up_begins_at_rate_zero_then_nothing_is_shortened(arguments: dict[str, Any]) -> None:
    found = []
    for rate in (0.0, 1e-9):
        model = make("mlp")
        kfac = KFACPreconditioner(model, lr=lambda step, rate=rate: rate * (step + 1), **arguments)
        passes, num_tokens = losses(0, [8])
        passes[0](model).backward()
        kfac.step(num_tokens=num_tokens)
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(*found)


def test_report_when_asked_at_an_early_update_then_is_that_of_the_others() -> None:
    model = make("mlp")
    kfac = KFACPreconditioner(model)
    reports = []
    for _ in range(4):
        reports.append(kfac.report())
        passes, num_tokens = losses(0, [8])
        passes[0](model).backward()
        kfac.step(num_tokens=num_tokens)
    assert {report.factor_update_steps for report in reports} == {10}
    assert len({report.cost(64) for report in reports}) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("step"), "has no `step`"),
        (lambda state: state.update(formulas="kfac-pytorch"), "of kfac-pytorch's formulas, and these are llm.kfac's"),
        (lambda state: state.pop("fc/count"), "fc/count does not fit"),
    ],
)
def test_state_when_of_something_else_then_is_refused_and_nothing_is_changed(
    change: Callable[[dict[str, Any]], object], words: str
) -> None:
    kfac = KFACPreconditioner(make("mlp"))
    before = kfac.state_dict()
    state = {name: value + 1 if isinstance(value, Tensor) else value for name, value in before.items()}
    change(state)
    with pytest.raises(ValueError, match=words):
        kfac.load_state_dict(state)
    after = kfac.state_dict()
    assert all(torch.equal(torch.as_tensor(after[name]), torch.as_tensor(value))
               for name, value in before.items() if name != "formulas")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"factor_update_steps": 0}, "factor_update_steps is at least 1, not 0"),
        ({"damping": 0.0}, "damping is above 0"),
        ({"factor_decay": 1.5}, "factor_decay is above 0 and at most 1"),
        ({"method": "svd"}, "method is one of 'eigen', 'inverse', not 'svd'"),
        ({"compat": "kfac"}, "compat is one of None, 'kfac-pytorch'"),
        ({"kl_clip": 1e-3, "lr": 0.1}, "kl_clip needs rescale=None"),
        ({"kl_clip": 1e-3, "rescale": None}, "and lr"),
        ({"compat": "kfac-pytorch", "stagger": True}, "stagger cannot be combined"),
        ({"method": "inverse", "power": 0.5}, 'power needs method="eigen"'),
        ({"power": lambda _: 1.0}, "power is a number, not a function of the step"),
        ({"factor_dtype": torch.float16}, "factor_dtype is torch.float16"),
    ],
)
def test_arguments_when_out_of_bounds_then_are_refused_by_name(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KFACPreconditioner(make("mlp"), **arguments)
