"""Counters of a run, and their way through a checkpoint."""

from __future__ import annotations

import json
import math

import pytest
import torch

from llm.training.state import LossWindow, TrainState
from llm.training.updaters.base import StepReport


def report(loss: float, **fields: bool) -> StepReport:
    return StepReport(loss=loss, grad_norm=torch.tensor(1.0), lr=1e-3, **fields)


def test_state_when_updates_are_added_then_counts_them() -> None:
    state = TrainState()
    state.add(report(2.0), num_tokens=256, seconds=0.5)
    state.add(report(4.0), num_tokens=256, seconds=0.25, data_seconds=0.125)
    assert (state.step, state.tokens, state.num_skipped, state.train_seconds) == (2, 512, 0, 0.75)
    assert state.window == LossWindow(loss=6.0, num_losses=2, num_steps=2, seconds=0.75, data_seconds=0.125)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_state_when_an_update_was_skipped_then_counts_it_and_keeps_the_mean_finite(loss: float) -> None:
    state = TrainState()
    state.add(report(2.0), num_tokens=8, seconds=1)
    state.add(report(loss, skipped=True), num_tokens=8, seconds=1)
    assert (state.step, state.num_skipped) == (2, 1)
    assert state.window.loss / state.window.num_losses == 2.0
    assert state.window.num_steps == 2


def test_state_when_updates_are_skipped_in_a_row_then_those_that_lower_the_loss_scale_do_not_count() -> None:
    state = TrainState()
    counts = []
    for fields in ({"skipped": True}, {"skipped": True}, {}, {"skipped": True},
                  {"skipped": True, "loss_scale_is_falling": True}, {"skipped": True}):  # fmt: skip
        state.add(report(2.0, **fields), num_tokens=8, seconds=1)
        counts.append(state.num_skipped_in_a_row)
    assert counts == [1, 2, 0, 1, 0, 1]
    assert state.num_skipped == 5


@pytest.mark.parametrize("eval_loss", [None, 1.2345678901234567])
def test_state_when_it_went_through_json_then_is_equal_and_counts_on_equally(eval_loss: float | None) -> None:
    state = TrainState(eval_loss=eval_loss)
    for number in range(3):
        state.add(report(0.1 * number, skipped=number == 1), num_tokens=7, seconds=0.1)
    restored = TrainState.from_json(json.loads(json.dumps(state.to_json())))
    assert restored == state
    for counters in (restored, state):
        counters.add(report(1 / 3), num_tokens=7, seconds=0.1)
    assert restored == state
    assert isinstance(restored.window, LossWindow)


def test_state_when_there_are_two_then_they_share_no_window() -> None:
    one = TrainState()
    other = TrainState()
    one.add(report(1.0), num_tokens=1, seconds=1)
    assert other.window.num_steps == 0


def test_evaluations_when_added_then_the_lowest_finite_loss_is_the_best() -> None:
    state = TrainState(step=3)
    assert [state.add_evaluation(loss) for loss in (2.0, 1.5, 1.5, math.nan, 1.75)] == [True, True, False, False, False]
    assert (state.best_eval_loss, state.eval_loss, state.eval_step) == (1.5, 1.75, 3)
