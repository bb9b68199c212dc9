"""Layers, memory and cost that a preconditioner reports."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from llm.kfac import KFACPreconditioner, Report
from tests.kfac.models import Mlp, data, linear, loss_sum


def test_report_when_compared_with_the_state_then_has_the_same_bytes() -> None:
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 5, bias=False))
    for method in ("eigen", "inverse"):
        kfac = KFACPreconditioner(model, method=method)
        report, state = kfac.report(), kfac.state_dict()
        state_bytes = sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))
        assert report.factor_bytes == 4 * sum(n * (n + 1) // 2 for n in (10, 8, 8, 5))
        assert report.factor_bytes + report.inverse_bytes == state_bytes
        assert report.capture_bytes == report.factor_bytes
        kfac.close()


def test_report_when_factor_updates_or_inverses_are_cheaper_then_the_cost_falls(tiny_gpt2: PreTrainedModel) -> None:
    costs = []
    for arguments in (
        {"factor_update_steps": 1},
        {},
        {"method": "inverse"},
        {"method": "inverse", "factor_tokens": 64},
    ):
        kfac = KFACPreconditioner(tiny_gpt2, **arguments)  # type: ignore[arg-type]
        costs.append(kfac.report().cost(4096))
        kfac.close()
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)


def test_report_when_read_at_an_early_step_then_is_the_same_as_later() -> None:
    model = Mlp(linear(True))
    kfac = KFACPreconditioner(model)
    reports = []
    for _ in range(4):
        reports.append(kfac.report())
        loss_sum(model, *data(0)).backward()
        kfac.step()
    assert {report.factor_update_steps for report in reports} == {10}
    assert len({report.cost(64) for report in reports}) == 1


def test_cost_when_computed_then_is_the_added_work_over_the_models_own() -> None:
    report = Report(
        layers={"fc": (4, 5)}, skipped={"": "its weight is frozen"}, owners={"fc": 0}, factor_bytes=1_500_000,
        inverse_bytes=2_000_000, capture_bytes=500_000, capture_flops=20.0, refresh_flops=3000.0, step_flops=50.0,
        model_flops=60.0, factor_update_steps=10, inv_update_steps=100, factor_tokens=None, world_size=2,
    )  # fmt: skip
    # 100 tokens, 50 on each rank: 20 * 50 / 10 + 3000 / 100 + 50 of 60 * 50.
    assert report.cost(100) == pytest.approx((100 + 30 + 50) / 3000)
    # 40 of them, 20 on each rank, are in a factor update.
    assert dataclasses.replace(report, factor_tokens=40).cost(100) == pytest.approx((40 + 30 + 50) / 3000)
    assert str(report).splitlines() == [
        "K-FAC on 1 of 2 modules with weights: 1.5 MB of factors and 2.0 MB of inverses on this rank, "
        "0.5 MB more during a factor update",
        "  left to the optimizer: (model): its weight is frozen",
    ]
