"""What happens after an update: a record, an evaluation, samples, a checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm.config.errors import Stopped, UserError
from llm.config.options import Options
from llm.data.batches.blocks import Blocks
from llm.data.batches.loader import BlockSource, evaluation_batches
from llm.data.dataset import TokenizedDataset
from llm.evaluation.perplexity import Evaluation, evaluate
from llm.files.atomic import sync_file
from llm.models.flops import flops_per_token, peak_flops
from llm.models.language_model import LanguageModel
from llm.models.sampling import sample
from llm.training.accelerator import Compute
from llm.training.checkpoints.async_saver import AsyncSaver
from llm.training.checkpoints.store import save_checkpoint
from llm.training.plan import Plan
from llm.training.run_dir.folder import RunDirectory
from llm.training.run_dir.formatting import evaluation_line, training_line
from llm.training.run_dir.trackers import Tracking
from llm.training.seeding import derive_seed
from llm.training.state import LossWindow, TrainState
from llm.training.supervision.stop_signals import StopRequest
from llm.training.supervision.watchdog import Watchdog
from llm.training.updaters.synchronous import StepReport, SynchronousUpdater

log = logging.getLogger(__name__)

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAMPLE_TOKENS = 128
_SAMPLE_TEMPERATURE = 0.8
_SAMPLE_TOP_K = 200


class Gathered(NamedTuple):
    """What the updater gave for a checkpoint, and for how long the training stood still."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    seconds: float


class Actions:
    """The run's parts, and what is done with them between updates.

    Attributes:
        newest: the last evaluation; None before the first.
    """

    def __init__(
        self,
        options: Options,
        machine: Compute,
        folder: RunDirectory | None,
        text: TokenizedDataset,
        blocks: BlockSource,
        validation: Blocks | None,
        plan: Plan,
        progress: TrainState,
        updater: SynchronousUpdater,
        language_model: LanguageModel,
        tracking: Tracking,
        saver: AsyncSaver | None,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self.options, self.machine, self.world, self.folder = options, machine, machine.world, folder
        self.text, self.blocks, self.validation, self.plan = text, blocks, validation, plan
        self.progress, self.updater = progress, updater
        self.language_model, self.tracking, self.saver = language_model, tracking, saver
        self.token_bytes, self.bytes_per_token = text.bytes_of_ids()
        self.flops_per_token = flops_per_token(self.model, plan.block_size)
        dtype = _DTYPES[machine.precision]
        self.peak_flops = peak_flops(self.world.device, dtype)
        self.stop, self.watchdog = stop, watchdog
        self._first_step = progress.step
        self.newest: Evaluation | None = None
        self._is_best = False
        self._reasons: list[str] = []
        self._gathered_step: int | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The HuggingFace model inside all wrappers."""
        return self.language_model.model

    def record(self, report: StepReport) -> None:
        """One training record: means since the last one."""
        window, self.progress.window = self.progress.window, LossWindow()
        step = self.progress.step
        loss = window.loss / window.num_losses if window.num_losses else None
        if loss is not None:
            self.progress.train_loss = loss
        speed = window.num_steps * self.plan.tokens_per_step / max(window.seconds, 1e-9)
        values: dict[str, Any] = {
            "loss": loss,
            "lr": report.lr,
            "grad_norm": float(report.grad_norm),
            "tokens": self.progress.tokens,
            "tokens_per_second": speed,
            "data_wait": window.data_seconds / max(window.seconds, 1e-9),
            "num_skipped": self.progress.num_skipped,
        }
        if self.plan.num_blocks is not None:
            values["epoch"] = step * self.plan.global_batch / self.plan.num_blocks
        if self.peak_flops:
            values["mfu"] = speed * self.flops_per_token / (self.peak_flops * self.world.size)
        eta = self.progress.train_seconds / step * (self.plan.num_steps - step)
        log.info(training_line(step, self.plan.num_steps, values, eta_seconds=eta))
        self.tracking.record(step, values)

    def evaluate(self, report: StepReport | None = None) -> None:
        """Loss, perplexity and bits per byte of the validation text, on all ranks.

        Raises:
            Stopped: on all ranks, when one was asked to stop; nothing is kept of what was measured.
        """
        if self.validation is None:
            return
        batches = evaluation_batches(
            self.validation,
            batch_size=self.options.evaluation.per_device_eval_batch_size,
            rank=self.world.rank,
            num_ranks=self.world.size,
            max_batches=self.options.evaluation.max_eval_batches,
            device=self.world.device,
        )
        with self.watchdog.phase("the evaluation"):
            found = evaluate(
                self.language_model,
                batches,
                device=self.world.device,
                token_bytes=self.token_bytes,
                bytes_per_token=self.bytes_per_token,
                sum_over_ranks=self.world.all_reduce_sum,
                should_stop=self.stop,
            )
        if found is None:
            raise Stopped(self.stop.reason)
        self.newest = found
        # A run that is resumed at its very end has its record already.
        is_new = self.progress.eval_step != self.progress.step
        self._is_best = self.progress.add_evaluation(self.newest.loss)
        values = {
            "eval_loss": self.newest.loss,
            "perplexity": self.newest.perplexity,
            "bits_per_byte": self.newest.bits_per_byte,
        }
        log.info(evaluation_line(self.progress.step, values))
        if is_new:
            self.tracking.record(self.progress.step, values)

    def sample(self, report: StepReport | None = None, *, num_samples: int = 1) -> None:
        """Text of the model as it is now, on rank 0; the others wait, but in no collective.

        What an earlier start recorded is not made again.

        Raises:
            Stopped: on all ranks, when rank 0 was asked to stop; nothing of it is kept.
        """
        with self.watchdog.phase("the samples"):
            self.world.run_on_main(lambda: self._sample(num_samples))

    def _sample(self, num_samples: int) -> None:
        if self.tracking.has_samples(self.progress.step):
            return
        texts = sample(
            self.model,
            self.text.tokenizer,
            self.options.evaluation.sample_prompt,
            num_samples=num_samples,
            max_new_tokens=_SAMPLE_TOKENS,
            temperature=_SAMPLE_TEMPERATURE,
            top_k=_SAMPLE_TOP_K,
            seed=derive_seed(self.plan.seed, 2, self.progress.step),
            should_stop=self.stop,
        )
        if self.stop():
            raise Stopped(self.stop.reason)
        for number, text in enumerate(texts, 1):
            log.info("--- sample %d of step %d ---\n%s", number, self.progress.step, text)
        self.tracking.record(self.progress.step, {"samples": texts})

    def check_health(self, report: StepReport) -> None:
        """Ends a run whose gradients are not finite any more, on all ranks at once.

        Raises:
            UserError: too many updates in a row were skipped. A loss scale of fp16 that still has room to
                fall is no illness.
        """
        scaler = self.machine.accelerator.scaler
        if report.skipped and scaler is not None and scaler.get_scale() >= 1:
            self.progress.num_skipped_in_a_row = 0
        number = self.progress.num_skipped_in_a_row
        if number >= self.options.training.max_skipped_updates:
            raise UserError(
                f"the gradients of {number} updates in a row were not finite (the last is {self.progress.step}): the"
                " run stops, its checkpoints are as they were; try a lower --learning_rate or more --num_warmup_steps"
            )

    def wants_checkpoint(self) -> bool:
        """Whether this rank, which can only be rank 0, knows that one is due after the update that is being made.

        All must hear of it: the state of an update is gathered from all ranks.
        """
        return self._look_for_reasons(self.progress.step + 1)

    def save_what_is_due(self, report: StepReport | None = None) -> None:
        """A checkpoint, if one is due after this update; on all ranks. The training goes on while it is written.

        Args:
            report: of this update; None where an earlier start made it.

        Raises:
            UserError: the one before could not be written, or the folder is another run's by now.
        """
        if self.folder is not None:
            self.folder.require_ours(look=False)
        if self.saver is not None:
            self.saver.check()
        is_best, self._is_best = self._is_best, False
        if report is not None:
            is_due = report.save
        else:
            is_due = self.world.broadcast(self._look_for_reasons(self.progress.step))
        if self.folder is not None and (is_due or is_best):
            self._save(self._gather(), self._reasons + ["best"] * is_best)

    def _look_for_reasons(self, step: int) -> bool:
        self._reasons = self.saver.reasons(step) if self.saver is not None else []
        return bool(self._reasons)

    def gather_last(self) -> Gathered | None:
        """What `save_now` will write: None if this update has a checkpoint already. On all ranks."""
        is_there = self.folder is None or self._gathered_step == self.progress.step
        return None if is_there else self._gather()

    def save_now(self, gathered: Gathered | None, reason: str) -> None:
        """On rank 0 a checkpoint of what was gathered, if anything was; returns when the newest one is durable.

        Raises:
            UserError: it could not be written.
        """
        if self.saver is not None:
            if gathered is not None:
                self._save(gathered, [reason])
            self.saver.wait()
            if self.saver.refusal is not None:
                raise self.saver.refusal

    def _gather(self) -> Gathered:
        """The updater's state, for which all ranks may be needed."""
        started = time.monotonic()
        with self.watchdog.phase("the ranks' parts of a checkpoint"):
            tensors, numbers = self.updater.state()
        self._gathered_step = self.progress.step
        return Gathered(tensors, numbers, time.monotonic() - started)

    def _save(self, gathered: Gathered, reasons: list[str]) -> None:
        """Rank 0 writes; the others had to give their parts only."""
        if self.saver is None:
            return
        assert self.folder is not None
        folder, step = self.folder, self.progress.step
        state = {
            "reasons": reasons,
            "progress": self.progress.state(),
            "plan": asdict(self.plan),
            "identity": self.text.identity(),
            "mixed_precision": self.machine.precision,
            "updater": gathered.numbers,
            "world": {"num_processes": self.world.size, "num_nodes": self.world.num_nodes},
        }

        def write(*, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
            started = time.monotonic()
            folder.require_ours()
            if folder.metrics.exists():
                sync_file(folder.metrics)  # the records up to this step are as durable as the checkpoint
            save_checkpoint(
                folder.checkpoints,
                step,
                model=self.model,
                tokenizer=self.text.tokenizer,
                weights=weights,
                tensors=tensors,
                state=state,
            )
            self.stop.deadline.note_save(time.monotonic() - started)

        with self.watchdog.phase("the checkpoint before this one, which is still being written"):
            self.saver.save(
                self.progress.step,
                self.model.state_dict(),
                gathered.tensors,
                write,
                reasons,
                gathering_seconds=gathered.seconds,
            )

    def close(self) -> None:
        """Ends what still goes on: the checkpoint that is being written, and the trackers."""
        if self.saver is not None:
            self.saver.close()
        self.tracking.close()

    def stop_here(self) -> None:
        """Saves what was trained since the last checkpoint, and says and writes down why the run ends early.

        All ranks return when that is durable: a launcher kills the others when the first one leaves.

        Raises:
            UserError: on every rank, when the checkpoint could not be written.
        """
        gathered = self.gather_last() if self.progress.step > self._first_step else None
        with self.watchdog.phase("the last checkpoint"):
            self.world.run_on_main(lambda: self._stop_here(gathered))

    def _stop_here(self, gathered: Gathered | None) -> None:
        step = self.progress.step
        if step > self._first_step:
            self.save_now(gathered, "stop")
        # Another rank may have seen first what this one sees by now.
        reason = self.stop.reason if self.stop() else "another rank"
        self.text.check()  # a stream that broke is saved like a stop, and is none
        kept = "; continue with --resume_from_checkpoint" if self.folder else "; nothing was kept"
        log.info("stopped by %s after step %d%s", reason, step, kept)
        if self.folder is not None:
            self.folder.write_status("stopped", step=step, reason=reason, exit_code=Stopped.exit_code)
