"""When a checkpoint is due, and how its parts get from all ranks to the saver on rank 0."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from llm.config.errors import Stopped
from llm.files.atomic import sync_file
from llm.training.callbacks.evaluation import EvaluationCallback
from llm.training.checkpoints.async_saver import Write
from llm.training.checkpoints.gather import gather_tensors
from llm.training.checkpoints.store import save_checkpoint
from llm.training.context import RunContext
from llm.training.triggers import Trigger, at_end, every, every_epoch
from llm.training.updaters.base import StepReport

log = logging.getLogger(__name__)


class CheckpointingCallback:
    """Decides after every update whether a checkpoint is due, and saves it.

    All ranks take part in a save: each gives its parts of the weights and of the updater's state. Rank 0 copies them to
    host memory and writes them in a thread, while the training continues.

    Args:
        context: the parts of the run.
        evaluation: knows which update has the best evaluation.
    """

    def __init__(self, context: RunContext, evaluation: EvaluationCallback) -> None:
        self._context = context
        self._evaluation = evaluation
        self._first_step = context.state.step
        self._saved_step: int | None = None
        self._requests: list[str] = []
        interval = context.options.output.checkpointing_steps
        plan = context.plan
        self._schedule: dict[str, Trigger] = {
            "regular": every_epoch(plan.num_blocks, plan.global_batch) if interval == "epoch" else every(interval),
            "end": at_end(plan.num_steps),
        }

    def should_save(self) -> bool:
        """Whether a checkpoint was requested by the clock or by the file SAVE, which only rank 0 knows.

        It is this rank's vote: the other ranks must learn of it, because all take part in a save.
        """
        saver = self._context.saver
        self._requests = saver.requests() if saver is not None else []
        return bool(self._requests)

    def run(self, report: StepReport | None = None) -> None:
        """Save a checkpoint if one is due after this update, on all ranks.

        Args:
            report: of this update; None where an earlier start made the update.

        Raises:
            UserError: the checkpoint before could not be written, or another run has taken the folder over.
        """
        context = self._context
        if context.run_dir is None:
            return
        context.run_dir.require_lock(reread=False)
        if context.saver is not None:
            context.saver.check()
        if report is None:
            is_requested = context.world.broadcast(self.should_save())
        else:
            is_requested = report.votes is not None and report.votes.save
        step = context.state.step
        reasons = [reason for reason, trigger in self._schedule.items() if trigger(step)]
        if is_requested:
            # Only rank 0 knows them, and only rank 0 writes them down.
            reasons += self._requests or ["asked"]
        if self._evaluation.best_step == step:
            reasons.append("best")
        if reasons and self._saved_step != step:
            self._save(reasons)

    def save_last(self, reason: str) -> None:
        """Save the newest update unless that has been done; return on all ranks when the newest checkpoint is durable.

        Args:
            reason: why: `stop` or `end`.

        Raises:
            UserError: on every rank, when a checkpoint could not be written.
        """
        context = self._context
        if context.run_dir is None:
            return
        if self._saved_step != context.state.step:
            self._save([reason])
        context.world.run_on_main(self._wait)

    def _wait(self) -> None:
        saver = self._context.saver
        if saver is not None:
            saver.wait()
            if saver.skipped_because is not None and saver.step == self._context.state.step:
                raise saver.skipped_because

    def stop(self) -> None:
        """Save what was trained since the last checkpoint, and log and record why the run ends early.

        All ranks return when that is durable: a launcher kills the others when the first one leaves.

        Raises:
            UserError: on every rank, when the checkpoint could not be written.
        """
        context = self._context
        with context.watchdog.phase("the last checkpoint"):
            if context.state.step > self._first_step:
                self.save_last("stop")
            context.world.run_on_main(self._report_stop)

    def _report_stop(self) -> None:
        context = self._context
        # Another rank may have been asked to stop first, and this one since.
        reason = context.stop.reason if context.stop() else "another rank"
        context.dataset.check()  # a stream that failed is saved like a stop, and then reported as a failure
        hint = "; continue with --resume_from_checkpoint" if context.run_dir else "; nothing was kept"
        log.info("stopped by %s after step %d%s", reason, context.state.step, hint)
        if context.run_dir is not None:
            context.run_dir.write_status("stopped", step=context.state.step, reason=reason, exit_code=Stopped.exit_code)

    def _save(self, reasons: list[str]) -> None:
        """Hand the weights and the updater's state of all ranks to the saver."""
        context = self._context
        self._saved_step = context.state.step
        started = time.monotonic()
        with context.watchdog.phase("the checkpoint before this one, which is still being written"):
            # Rank 0 may fail here, and the others must not wait for it in a collective.
            context.world.run_on_main(self._wait)
        with context.watchdog.phase("the ranks' parts of a checkpoint"):
            updater_state = context.updater.state()
            tensors = gather_tensors(context.world, updater_state.tensors)
        gathering_seconds = time.monotonic() - started
        weights = context.updater.full_weights()
        if context.saver is None:
            for _ in weights:
                pass  # rank 0 needs this rank's parts
            return
        context.saver.save(
            context.state.step,
            weights,
            tensors,
            self._writer(reasons, updater_state.numbers),
            reasons,
            gathering_seconds=gathering_seconds,
        )

    def _writer(self, reasons: list[str], updater_numbers: dict[str, Any]) -> Write:
        """Return the function that writes this checkpoint in the saver's thread, with the counters as they are now."""
        context = self._context
        run_dir = context.run_dir
        assert run_dir is not None
        step = context.state.step
        facts = {
            "reasons": reasons,
            "progress": context.state.to_json(),
            "plan": asdict(context.plan),
            "identity": context.dataset.identity(),
            "mixed_precision": context.compute.precision,
            "updater": updater_numbers,
            "world": {"num_processes": context.world.size, "num_nodes": context.world.num_nodes},
        }

        def write(*, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
            started = time.monotonic()
            run_dir.require_lock()
            if run_dir.metrics.exists():
                sync_file(run_dir.metrics)  # the records up to this step are as durable as the checkpoint
            save_checkpoint(
                run_dir.checkpoints,
                step,
                model=context.updater.model.model,
                tokenizer=context.dataset.tokenizer,
                weights=weights,
                tensors=tensors,
                state=facts,
            )
            context.stop.deadline.record_save(time.monotonic() - started)

        return write
