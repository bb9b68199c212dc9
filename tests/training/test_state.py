"""Counters of a run survive a checkpoint."""

from __future__ import annotations

import json
import math

import pytest
import torch

from llm.training.state import LossWindow, TrainState
from llm.training.updaters.base import StepReport


def report(loss: float, **facts: bool) -> StepReport:
    return StepReport(loss=loss, grad_norm=torch.tensor(1.0), lr=1e-3, **facts)


def test_progress_when_updates_are_added_then_counts_them() -> None:
    progress = TrainState()
    progress.add(report(2.0), num_tokens=256, seconds=0.5)
    progress.add(report(4.0), num_tokens=256, seconds=0.25, data_seconds=0.125)
    assert (progress.step, progress.tokens, progress.num_skipped, progress.train_seconds) == (2, 512, 0, 0.75)
    assert progress.window == LossWindow(loss=6.0, num_losses=2, num_steps=2, seconds=0.75, data_seconds=0.125)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_progress_when_an_update_was_skipped_then_counts_it_and_keeps_the_mean_finite(loss: float) -> None:
    progress = TrainState()
    progress.add(report(2.0), num_tokens=8, seconds=1)
    progress.add(report(loss, skipped=True), num_tokens=8, seconds=1)
    assert (progress.step, progress.num_skipped) == (2, 1)
    assert progress.window.loss / progress.window.num_losses == 2.0
    assert progress.window.num_steps == 2


def test_progress_when_updates_are_skipped_in_a_row_then_those_that_lower_the_loss_scale_do_not_count() -> None:
    progress = TrainState()
    counts = []
    for facts in ({"skipped": True}, {"skipped": True}, {}, {"skipped": True},
                  {"skipped": True, "loss_scale_is_falling": True}, {"skipped": True}):  # fmt: skip
        progress.add(report(2.0, **facts), num_tokens=8, seconds=1)
        counts.append(progress.num_skipped_in_a_row)
    assert counts == [1, 2, 0, 1, 0, 1]
    assert progress.num_skipped == 5


@pytest.mark.parametrize("eval_loss", [None, 1.2345678901234567])
def test_progress_when_it_went_through_json_then_is_equal_and_goes_on_alike(eval_loss: float | None) -> None:
    progress = TrainState(eval_loss=eval_loss)
    for number in range(3):
        progress.add(report(0.1 * number, skipped=number == 1), num_tokens=7, seconds=0.1)
    restored = TrainState.from_json(json.loads(json.dumps(progress.to_json())))
    assert restored == progress
    for each in (restored, progress):
        each.add(report(1 / 3), num_tokens=7, seconds=0.1)
    assert restored == progress
    assert isinstance(restored.window, LossWindow)


def test_progress_when_two_runs_are_made_then_share_no_window() -> None:
    one, other = TrainState(), TrainState()
    one.add(report(1.0), num_tokens=1, seconds=1)
    assert other.window.num_steps == 0
