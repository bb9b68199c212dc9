"""The optimizer that the options describe, and the rows of the registry."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn
from transformers import GPT2Config, PreTrainedModel

from llm.config.options import OptimizerOptions
from llm.optim.groups import hidden_matrices, parameter_groups
from llm.optim.registry import OPTIMIZERS, OptimizerSpec, build_optimizer, unused_prefixes
from llm.training.estimates import count_values


def test_optimizer_when_adamw_then_uses_the_options(tiny_gpt2: PreTrainedModel) -> None:
    options = OptimizerOptions(learning_rate=3e-4, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = build_optimizer(tiny_gpt2, options)
    assert type(optimizer) is torch.optim.AdamW
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (3e-4, 3e-4, decay)
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
        assert len(group["param_names"]) == len(group["params"])


def test_optimizer_when_adamw_steps_then_the_update_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    options = OptimizerOptions(learning_rate=0.1, weight_decay=0.5)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = build_optimizer(model, options)
    model(torch.ones(1, 3)).sum().backward()
    grad = model.weight.grad.clone()
    optimizer.step()
    # After one update both bias-corrected moments are the gradient itself and its square.
    step = grad / (grad.abs() + 1e-8)
    assert torch.allclose(model.weight, weight * (1 - 0.1 * 0.5) - 0.1 * step, atol=1e-6)
    assert torch.allclose(model.bias, bias - 0.1, atol=1e-6)


def test_optimizer_when_sgd_then_momentum_is_beta1(tiny_gpt2: PreTrainedModel) -> None:
    optimizer = build_optimizer(tiny_gpt2, OptimizerOptions(optim="sgd", adam_beta1=0.7))
    assert type(optimizer) is torch.optim.SGD
    assert {group["momentum"] for group in optimizer.param_groups} == {0.7}


def test_optimizer_when_no_parameter_is_trained_then_raises() -> None:
    with pytest.raises(ValueError, match="no parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimizerOptions())


def test_registry_when_compared_with_the_option_then_holds_the_same_names() -> None:
    assert get_args(OptimizerOptions.model_fields["optim"].annotation) == tuple(OPTIMIZERS)
    assert all(spec.name == name for name, spec in OPTIMIZERS.items())


@pytest.mark.parametrize("optim", list(OPTIMIZERS))
def test_row_when_its_optimizer_is_built_then_says_what_the_optimizer_is(
    optim: str, tiny_gpt2: PreTrainedModel
) -> None:
    spec = OPTIMIZERS[optim]
    options = OptimizerOptions.model_validate({"optim": optim, "learning_rate": 3e-4})
    optimizer = build_optimizer(tiny_gpt2, options)
    assert type(optimizer) is spec.optimizer_class
    assert optimizer.defaults["lr"] == optimizer.param_groups[spec.main_group]["initial_lr"] == 3e-4
    assert {"learning_rate", *spec.other_rates.values()} <= set(OptimizerOptions.model_fields)
    rates = {3e-4, *(getattr(options, option) for option in spec.other_rates.values())}
    assert rates == {group["initial_lr"] for group in optimizer.param_groups}


@pytest.mark.parametrize("optim", list(OPTIMIZERS))
def test_row_when_the_optimizer_has_stepped_then_counts_the_values_in_its_state(
    optim: str, tiny_gpt2: PreTrainedModel
) -> None:
    spec = OPTIMIZERS[optim]
    optimizer = build_optimizer(tiny_gpt2, OptimizerOptions.model_validate({"optim": optim}))
    ids = torch.arange(8).unsqueeze(0)
    tiny_gpt2(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    states = optimizer.state.values()
    num_values = sum(value.numel() for state in states for value in state.values() if value.ndim)
    assert spec.count_states(tiny_gpt2) == num_values
    if spec.external_state:
        assert {frozenset(state) for state in states} == {spec.external_state}


def test_main_group_when_muon_leaves_nothing_to_adamw_then_is_of_muon() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4, bias=False)])})
    assert set(hidden_matrices(model)) == {"blocks.0.weight"}
    optimizer = build_optimizer(model, OptimizerOptions(optim="muon", muon_learning_rate=0.03))
    main = optimizer.param_groups[OPTIMIZERS["muon"].main_group]
    assert (main["initial_lr"], optimizer.defaults["lr"]) == (0.03, 0.03)


def test_prefixes_when_another_optimizer_is_chosen_then_are_unused() -> None:
    assert unused_prefixes("adamw") == {"muon": "muon_"}
    assert unused_prefixes("muon") == {}


def test_registry_when_a_row_is_added_then_its_optimizer_is_built_and_counted(
    monkeypatch: pytest.MonkeyPatch, tiny_gpt2: PreTrainedModel
) -> None:
    def build(model: nn.Module, options: OptimizerOptions) -> torch.optim.RMSprop:
        groups = parameter_groups(model, options.weight_decay)
        return torch.optim.RMSprop(groups, lr=options.learning_rate, momentum=0.9, centered=True)

    spec = OptimizerSpec(
        name="rmsprop",
        optimizer_class=torch.optim.RMSprop,
        build=build,
        count_states=lambda model: 3 * sum(parameter.numel() for parameter in model.parameters()),
        option_prefix="rms_",
    )
    monkeypatch.setitem(OPTIMIZERS, spec.name, spec)
    options = OptimizerOptions(learning_rate=0.01).model_copy(update={"optim": "rmsprop"})
    optimizer = build_optimizer(tiny_gpt2, options)
    assert type(optimizer) is torch.optim.RMSprop
    assert {group["initial_lr"] for group in optimizer.param_groups} == {0.01}
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    num_parameters, num_states = count_values(config, "rmsprop")
    assert num_states == 3 * num_parameters == 3 * count_values(config, "sgd")[1]
    assert unused_prefixes("adamw") == {"muon": "muon_", "rmsprop": "rms_"}
