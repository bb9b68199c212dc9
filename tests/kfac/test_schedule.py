"""When factors are captured and inverses refreshed, and matrices folded to their lower triangles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llm.kfac import KFACPreconditioner, dense_early
from llm.kfac.packed_symmetric import add_product, add_to_last_row, fold, folded_eye, folded_shape, folded_trace, unfold
from llm.kfac.schedule import is_due, is_refresh_due

ANCHOR = {"compat": "kfac-pytorch"}


def test_refresh_when_the_interval_is_long_then_is_dense_at_first() -> None:
    assert [step for step in range(45) if is_refresh_due(20, step)] == [0, 1, 2, 4, 8, 16, 20, 40]
    assert [step for step in range(6) if is_refresh_due(1, step)] == list(range(6))
    assert [step for step in range(45) if is_due(20, step)] == [0, 20, 40]


def test_refresh_when_delayed_then_follows_every_multiple_but_none_of_the_early_updates() -> None:
    found = [step for step in range(45) if is_refresh_due(20, step, 0.499)]
    assert found == [0, 1, 2, 4, 8, 16, 29]
    assert [step for step in range(4) if is_refresh_due(1, step, 0.9)] == list(range(4))


def test_capture_when_dense_early_then_comes_with_every_refresh() -> None:
    assert [step for step in range(31) if is_due(dense_early(10), step)] == [0, 1, 2, 4, 8, 10, 20, 30]


@pytest.mark.parametrize(("given", "captures"), [({}, 4), ({"factor_update_steps": 10}, 1), (ANCHOR, 1)])
def test_capture_when_no_interval_is_given_then_is_dense_early_but_in_compat(
    given: dict[str, Any], captures: int
) -> None:
    model = nn.Linear(2, 2)
    kfac = KFACPreconditioner(model, **given)
    for _ in range(5):
        model(torch.randn(3, 2)).square().mean().backward()
        kfac.step()
    assert kfac.state_dict()["/count"] == captures


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8])
def test_fold_when_unfolded_then_gives_the_lower_triangle_of_every_matrix(n: int) -> None:
    matrices = torch.randn(3, n, n)
    folded = fold(matrices)
    assert folded.shape == (3, *folded_shape(n))
    assert folded[0].numel() == n * (n + 1) // 2
    assert torch.equal(unfold(folded, n), matrices.tril())
    torch.testing.assert_close(folded_trace(folded, n), matrices.diagonal(dim1=-2, dim2=-1).sum(-1))
    eye = folded_eye(n, dtype=torch.float64, device=torch.device("cpu"))
    assert torch.equal(unfold(eye, n), torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 256, 257, 300, 523])
@pytest.mark.parametrize("has_constant", [False, True])
def test_add_product_when_added_twice_then_folded_is_the_whole_product(n: int, has_constant: bool) -> None:
    if n == 1 and has_constant:
        pytest.skip("a layer has an input")
    whole = torch.randn(7, n, dtype=torch.float64)
    if has_constant:
        whole[:, -1] = 1
    folded = torch.zeros(folded_shape(n), dtype=torch.float64)
    for rows, weight in ((whole[:4], 0.5), (whole[4:], 2.0)):
        add_product(folded, n, rows[:, :-1] if has_constant else rows, weight)
        if has_constant:
            add_to_last_row(folded, n, rows[:, :-1].sum(0) * weight, len(rows) * weight)
    expected = 0.5 * whole[:4].T @ whole[:4] + 2 * whole[4:].T @ whole[4:]
    torch.testing.assert_close(unfold(folded, n), expected.tril())
