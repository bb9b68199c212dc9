"""The training record and the health check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import llm.training.callbacks.metrics
from llm.config.errors import UserError
from llm.models.flops import flops_per_token
from llm.training.callbacks.metrics import MetricsCallback
from llm.training.state import LossWindow
from llm.training.updaters.base import StepReport
from tests.training.run_context import BLOCK_SIZE, make_context

REPORT = StepReport(loss=2.5, grad_norm=torch.tensor(0.75), lr=1e-3)
TOKENS_PER_STEP = 4 * BLOCK_SIZE


@pytest.fixture
def context(tiny_gpt2: Any, byte_tokenizer: Any) -> Any:
    """A run after update 4, whose last 3 updates are not recorded yet; the loss of one of them was not finite."""
    context = make_context(tiny_gpt2, byte_tokenizer)
    context.state.step = 4
    context.state.tokens = 4 * TOKENS_PER_STEP
    context.state.train_seconds = 2.0
    context.state.num_skipped = 1
    context.state.window = LossWindow(loss=6.0, num_losses=2, num_steps=3, seconds=1.5, data_seconds=0.15)
    return context


def test_record_when_updates_were_made_then_holds_their_means_and_begins_a_new_window(
    context: Any, log_lines: Callable[[], list[str]]
) -> None:
    MetricsCallback(context).record(REPORT)
    ((step, values),) = context.tracking.records
    assert step == 4
    assert values == {
        "loss": 3.0,
        "lr": 1e-3,
        "grad_norm": 0.75,
        "tokens": 4 * TOKENS_PER_STEP,
        "tokens_per_second": pytest.approx(3 * TOKENS_PER_STEP / 1.5),
        "data_wait": pytest.approx(0.1),
        "num_skipped": 1,
        "epoch": 4 * 4 / 40,
    }
    assert context.state.train_loss == 3.0
    assert context.state.window == LossWindow()
    # 4 updates took 2 s: the other 6 will take 3 s.
    assert log_lines() == [
        "step 4/10 | loss 3.000 | lr 1.0e-03 | grad_norm 0.75 | 64 tok/s | data_wait 10.0% | skipped 1 | eta 0:00:03"
    ]


def test_record_when_no_loss_was_finite_then_holds_none_and_the_state_keeps_the_earlier_loss(context: Any) -> None:
    context.state.train_loss = 2.0
    context.state.window = LossWindow(num_steps=3, seconds=1.5)
    MetricsCallback(context).record(REPORT)
    assert context.tracking.records[0][1]["loss"] is None
    assert context.state.train_loss == 2.0


def test_record_when_the_peak_of_the_device_is_known_then_holds_the_model_flops_utilization(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.training.callbacks.metrics, "peak_flops", lambda device, dtype: 1e9)
    MetricsCallback(replace(context, world=replace(context.world, size=2))).record(REPORT)
    expected = 3 * TOKENS_PER_STEP / 1.5 * flops_per_token(context.updater.model.model, BLOCK_SIZE) / (2 * 1e9)
    assert context.tracking.records[0][1]["mfu"] == pytest.approx(expected)


def test_record_when_the_length_of_an_epoch_is_unknown_then_has_no_epoch(context: Any) -> None:
    MetricsCallback(replace(context, plan=replace(context.plan, num_blocks=None))).record(REPORT)
    assert "epoch" not in context.tracking.records[0][1]


def test_health_when_too_many_updates_in_a_row_were_skipped_then_the_run_ends(context: Any) -> None:
    metrics = MetricsCallback(context)
    context.state.num_skipped_in_a_row = 2  # --max_skipped_updates is 3
    metrics.check_health(REPORT)
    context.state.num_skipped_in_a_row = 3
    with pytest.raises(UserError, match=r"3 updates.*--learning_rate"):
        metrics.check_health(REPORT)
