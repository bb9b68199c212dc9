"""Symmetric matrices folded to one triangle."""

from __future__ import annotations

import pytest
import torch

from llm.kfac.packed_symmetric import (
    add_product,
    add_to_last_row,
    fold,
    folded_eye,
    folded_shape,
    folded_trace,
    share_of_product,
    unfold,
)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8])
def test_fold_when_unfolded_then_is_the_lower_triangle_of_every_matrix(n: int) -> None:
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
def test_product_when_added_in_two_parts_then_is_the_full_product(n: int, has_constant: bool) -> None:
    if n == 1 and has_constant:
        pytest.skip("a layer has at least one input")
    all_rows = torch.randn(7, n, dtype=torch.float64)
    if has_constant:
        all_rows[:, -1] = 1
    folded = torch.zeros(folded_shape(n), dtype=torch.float64)
    for rows, weight in ((all_rows[:4], 0.5), (all_rows[4:], 2.0)):
        add_product(folded, n, rows[:, :-1] if has_constant else rows, weight)
        if has_constant:
            add_to_last_row(folded, n, rows[:, :-1].sum(0) * weight, len(rows) * weight)
    expected = 0.5 * all_rows[:4].T @ all_rows[:4] + 2 * all_rows[4:].T @ all_rows[4:]
    torch.testing.assert_close(unfold(folded, n), expected.tril())


def test_trace_when_a_number_of_a_row_is_not_finite_then_is_not_finite() -> None:
    for poison in (float("nan"), float("inf")):
        rows = torch.ones(3, 5)
        rows[1, 2] = poison
        folded = torch.zeros(folded_shape(5))
        add_product(folded, 5, rows, 1.0)
        assert not folded_trace(folded, 5).isfinite()


def test_share_when_on_a_cpu_then_panels_compute_less_than_the_full_product() -> None:
    assert share_of_product(torch.device("cpu")) == share_of_product(torch.device("meta")) == 0.6
    assert share_of_product(torch.device("cuda")) == 1.0
