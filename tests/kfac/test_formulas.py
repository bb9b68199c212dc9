"""The formulas, with numbers that can be checked by hand."""

from __future__ import annotations

import torch

from llm.kfac.formulas import Formulas, KfacPytorchFormulas

OURS, THEIRS = Formulas(), KfacPytorchFormulas()


def test_ema_decay_when_factors_are_few_then_is_that_of_a_plain_mean() -> None:
    count = torch.tensor([1.0, 2.0, 4.0, 100.0])
    torch.testing.assert_close(OURS.ema_decay(count, 0.95), torch.tensor([0.0, 0.5, 0.75, 0.95]))
    torch.testing.assert_close(THEIRS.ema_decay(count, 0.95), torch.full((4,), 0.95))


def test_scale_g_when_the_loss_is_scaled_then_divides_by_the_square() -> None:
    weight, rows = torch.tensor([4.0, 2.0]), torch.tensor([6.0, 3.0])
    scale = OURS.scale_g(weight, rows, num_tokens=None, loss_scale=2.0, world=3)
    torch.testing.assert_close(scale, rows / 4)
    scale = OURS.scale_g(weight, rows, num_tokens=12, loss_scale=torch.tensor(2.0), world=3)
    torch.testing.assert_close(scale, torch.tensor([3.0, 3.0]))
    scale = THEIRS.scale_g(weight, rows, num_tokens=12, loss_scale=2.0, world=3)
    torch.testing.assert_close(scale, torch.tensor([9 / 16, 9 / 8]))


def test_row_weight_when_passes_have_different_rows_then_only_kfac_pytorch_evens_them() -> None:
    assert (OURS.row_weight(5), THEIRS.row_weight(5)) == (1.0, 0.2)


def test_usable_when_sums_are_not_finite_or_zero_then_is_false() -> None:
    trace_a = torch.tensor([1.0, float("nan"), 1.0, 0.0])
    trace_g = torch.tensor([1.0, 1.0, float("inf"), 1.0])
    assert OURS.is_usable(trace_a, trace_g).tolist() == [True, False, False, False]
    assert THEIRS.is_usable(trace_a, trace_g).tolist() == [True, False, False, True]


def test_damping_when_split_over_the_factors_then_their_product_is_that_of_the_product() -> None:
    mean_a, mean_g = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0])
    product = OURS.damp_product(0.01, mean_a, mean_g)
    torch.testing.assert_close(product, torch.tensor([0.1, 0.21]))
    torch.testing.assert_close(OURS.damp_factor(0.01, mean_a) * OURS.damp_factor(0.01, mean_g), product)
    assert THEIRS.damp_product(0.01, mean_a, mean_g).tolist() == THEIRS.damp_factor(0.01, mean_a).tolist()
    torch.testing.assert_close(THEIRS.damp_factor(0.01, mean_a), torch.tensor([0.01, 0.01]))
