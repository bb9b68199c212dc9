"""A preconditioner that is resumed from its state gives the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm.kfac import KFACPreconditioner, dense_early
from tests.kfac.models import Mlp, data, linear, loss_sum

NUM_STEPS = 9
SETTINGS: dict[str, dict[str, Any]] = {
    "eigen": {"factor_update_steps": 2, "inv_update_steps": 5},
    "inverse": {"factor_update_steps": dense_early(3), "inv_update_steps": 4, "method": "inverse"},
    "stagger": {"factor_update_steps": 2, "inv_update_steps": 4, "stagger": True},
    "compat": {"factor_update_steps": 2, "inv_update_steps": 4, "compat": "kfac-pytorch"},
    "some_tokens": {"factor_update_steps": 1, "factor_tokens": 20, "damping": lambda step: 0.1 / (1 + step)},
}


def advance(model: nn.Module, kfac: KFACPreconditioner, steps: range) -> None:
    for step in steps:
        x, targets = data(step)
        num_tokens = int((targets != -100).sum())
        (loss_sum(model, x, targets) / num_tokens).backward()
        kfac.step(num_tokens=num_tokens)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad / parameter.grad.norm()
        model.zero_grad()


def new_model(name: str) -> tuple[nn.Module, KFACPreconditioner]:
    torch.manual_seed(3)
    model = Mlp(linear(True))
    return model, KFACPreconditioner(model, **SETTINGS[name])


@pytest.mark.parametrize("at", range(NUM_STEPS))
@pytest.mark.parametrize("name", SETTINGS)
def test_resume_when_at_any_step_then_is_bit_identical(name: str, at: int, tmp_path: Path) -> None:
    model, kfac = new_model(name)
    advance(model, kfac, range(at))
    state = kfac.state_dict()
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    advance(model, kfac, range(at, NUM_STEPS))
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    numbers = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    save_file(tensors, tmp_path / "kfac.safetensors")
    text = json.dumps(numbers)

    other, resumed = new_model(name)
    advance(other, resumed, range(2))  # the state before the load must not matter
    other.load_state_dict(weights)
    resumed.load_state_dict({**load_file(tmp_path / "kfac.safetensors"), **json.loads(text)})
    advance(other, resumed, range(at, NUM_STEPS))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    ends = kfac.state_dict(), resumed.state_dict()
    assert all(
        torch.equal(torch.as_tensor(ends[0][key]), torch.as_tensor(ends[1][key]))
        for key in ends[0]
        if key != "formulas"
    )


def test_state_when_of_another_method_or_model_then_is_refused_and_nothing_is_changed() -> None:
    model, kfac = new_model("eigen")
    advance(model, kfac, range(2))
    before = kfac.state_dict()
    other = nn.Sequential(nn.Linear(3, 3))
    for wrong in (new_model("inverse")[1], KFACPreconditioner(other)):
        with pytest.raises(ValueError, match=r"of another model or other K-FAC arguments: .* does not fit"):
            kfac.load_state_dict(wrong.state_dict())
    after = kfac.state_dict()
    assert all(
        torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before if key != "formulas"
    )
