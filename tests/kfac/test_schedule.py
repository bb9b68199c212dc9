"""When factors are captured and inverses refreshed, and matrices folded to their lower triangles."""

from __future__ import annotations

import pytest
import torch

from llm.kfac import dense_early
from llm.kfac.schedule import is_due, is_refresh_due
from llm.kfac.triangles import fold, folded_eye, folded_shape, folded_trace, unfold


def test_refresh_when_the_interval_is_long_then_is_dense_at_first() -> None:
    assert [step for step in range(45) if is_refresh_due(20, step)] == [0, 1, 2, 4, 8, 16, 20, 40]
    assert [step for step in range(6) if is_refresh_due(1, step)] == list(range(6))
    assert [step for step in range(45) if is_due(20, step)] == [0, 20, 40]


def test_capture_when_dense_early_then_comes_with_every_refresh() -> None:
    assert [step for step in range(31) if is_due(dense_early(10), step)] == [0, 1, 2, 4, 8, 10, 20, 30]


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
