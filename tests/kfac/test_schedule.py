"""The steps at which factors and inverses are updated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llm.kfac import KFACPreconditioner, dense_early
from llm.kfac.schedule import is_due, is_refresh_due

COMPAT = {"compat": "kfac-pytorch"}


def test_refresh_when_the_interval_is_long_then_is_dense_at_first() -> None:
    assert [step for step in range(45) if is_refresh_due(20, step)] == [0, 1, 2, 4, 8, 16, 20, 40]
    assert [step for step in range(6) if is_refresh_due(1, step)] == list(range(6))
    assert [step for step in range(45) if is_due(20, step)] == [0, 20, 40]


def test_refresh_when_it_has_an_offset_then_follows_the_multiples_but_not_the_early_steps() -> None:
    steps = [step for step in range(45) if is_refresh_due(20, step, 0.499)]
    assert steps == [0, 1, 2, 4, 8, 16, 29]
    assert [step for step in range(4) if is_refresh_due(1, step, 0.9)] == list(range(4))


def test_factor_update_when_dense_early_then_comes_with_every_refresh() -> None:
    assert [step for step in range(31) if is_due(dense_early(10), step)] == [0, 1, 2, 4, 8, 10, 20, 30]


@pytest.mark.parametrize(("arguments", "num_factor_updates"), [({}, 4), ({"factor_update_steps": 10}, 1), (COMPAT, 1)])
def test_factor_update_when_no_interval_is_given_then_is_dense_early_except_with_compat(
    arguments: dict[str, Any], num_factor_updates: int
) -> None:
    model = nn.Linear(2, 2)
    kfac = KFACPreconditioner(model, **arguments)
    for _ in range(5):
        model(torch.randn(3, 2)).square().mean().backward()
        kfac.step()
    assert kfac.state_dict()["/count"] == num_factor_updates
