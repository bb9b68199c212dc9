"""The optimizer that the options describe."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from llm.config.options import OptimizerOptions
from llm.optim.registry import build_optimizer


def test_optimizer_when_adamw_then_has_the_options(tiny_gpt2: PreTrainedModel) -> None:
    options = OptimizerOptions(learning_rate=3e-4, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = build_optimizer(tiny_gpt2, options)
    assert type(optimizer) is torch.optim.AdamW
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (3e-4, 3e-4, decay)
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
        assert len(group["param_names"]) == len(group["params"])


def test_optimizer_when_adamw_steps_then_is_the_textbook_update() -> None:
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


def test_optimizer_when_nothing_is_trained_then_refuses() -> None:
    with pytest.raises(ValueError, match="no parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimizerOptions())
