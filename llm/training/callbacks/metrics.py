"""The training record, and the check that the gradients stay finite."""

from __future__ import annotations

import logging
from typing import Any

import torch

from llm.config.errors import UserError
from llm.models.flops import flops_per_token, peak_flops
from llm.training.context import RunContext
from llm.training.run_dir.formatting import training_line
from llm.training.state import LossWindow
from llm.training.updaters.base import StepReport

log = logging.getLogger(__name__)

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class MetricsCallback:
    """Writes training records, and ends a run whose gradients are no longer finite."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._flops_per_token = flops_per_token(context.updater.model.model, context.plan.block_size)
        self._peak_flops = peak_flops(context.world.device, _DTYPES[context.compute.precision])

    def check_health(self, report: StepReport) -> None:
        """End a run whose gradients are no longer finite, on all ranks at once.

        Skipped steps do not count while the fp16 loss scale is still decreasing.

        Raises:
            UserError: too many updates in a row were skipped.
        """
        state = self._context.state
        number = state.num_skipped_in_a_row
        if number >= self._context.options.training.max_skipped_updates:
            raise UserError(
                f"the gradients of {number} updates in a row were not finite (the last is {state.step}): the"
                " run stops, its checkpoints are as they were; try a lower --learning_rate or more --num_warmup_steps"
            )

    def record(self, report: StepReport) -> None:
        """Write one training record: means over the updates since the last one."""
        plan = self._context.plan
        state = self._context.state
        window = state.window
        state.window = LossWindow()
        loss = window.loss / window.num_losses if window.num_losses else None
        if loss is not None:
            state.train_loss = loss
        tokens_per_second = window.num_steps * plan.tokens_per_step / max(window.seconds, 1e-9)
        values: dict[str, Any] = {
            "loss": loss,
            "lr": report.lr,
            "grad_norm": float(report.grad_norm),
            "tokens": state.tokens,
            "tokens_per_second": tokens_per_second,
            "data_wait": window.data_seconds / max(window.seconds, 1e-9),
            "num_skipped": state.num_skipped,
        }
        if plan.num_blocks is not None:
            values["epoch"] = state.step * plan.global_batch / plan.num_blocks
        if self._peak_flops:
            values["mfu"] = tokens_per_second * self._flops_per_token / (self._peak_flops * self._context.world.size)
        eta_seconds = state.train_seconds / state.step * (plan.num_steps - state.step)
        log.info(training_line(state.step, plan.num_steps, values, eta_seconds=eta_seconds))
        self._context.tracking.record(state.step, values)
