"""What happens after an update: a record, an evaluation, samples, a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from llm.config.options import Options
from llm.data.blocks import Blocks
from llm.data.loaders import Samples, evaluation_batches
from llm.engine.central import CentralUpdater, StepReport
from llm.engine.checkpoints import keep_newest, save_checkpoint
from llm.engine.folder import RunFolder
from llm.engine.lines import evaluation_line, training_line
from llm.engine.machine import Machine
from llm.engine.plan import Plan
from llm.engine.progress import Progress, Window
from llm.engine.randomness import mixed
from llm.engine.text import Text
from llm.engine.tracking import Tracking
from llm.evaluation.perplexity import Evaluation, evaluate
from llm.models.flops import flops_per_token, peak_flops
from llm.models.language_model import LanguageModel
from llm.models.sampling import sample

log = logging.getLogger(__name__)

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAMPLE_TOKENS = 128
_SAMPLE_TEMPERATURE = 0.8
_SAMPLE_TOP_K = 200


class Actions:
    """The run's parts, and what is done with them between updates.

    Attributes:
        newest: the last evaluation; None before the first.
    """

    def __init__(
        self,
        options: Options,
        machine: Machine,
        folder: RunFolder | None,
        text: Text,
        blocks: Samples,
        validation: Blocks | None,
        plan: Plan,
        progress: Progress,
        updater: CentralUpdater,
        language_model: LanguageModel,
        tracking: Tracking,
    ) -> None:
        self.options, self.machine, self.world, self.folder = options, machine, machine.world, folder
        self.text, self.blocks, self.validation, self.plan = text, blocks, validation, plan
        self.progress, self.updater = progress, updater
        self.language_model, self.tracking = language_model, tracking
        self.token_bytes, self.bytes_per_token = text.bytes_of_ids()
        self.flops_per_token = flops_per_token(self.model, plan.block_size)
        dtype = _DTYPES[machine.accelerator.mixed_precision]
        self.peak_flops = peak_flops(self.world.device, dtype)
        self.newest: Evaluation | None = None
        self._saved_step: int | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The HuggingFace model inside all wrappers."""
        return self.language_model.model

    def record(self, report: StepReport) -> None:
        """One training record: means since the last one."""
        window, self.progress.window = self.progress.window, Window()
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
        """Loss, perplexity and bits per byte of the validation text, on all ranks."""
        if self.validation is None:
            return
        batches = evaluation_batches(
            self.validation,
            batch_size=self.options.evaluation.per_device_eval_batch_size,
            rank=self.world.rank,
            num_ranks=self.world.size,
            max_batches=self.options.evaluation.max_eval_batches,
        )
        self.newest = evaluate(
            self.language_model,
            batches,
            device=self.world.device,
            token_bytes=self.token_bytes,
            bytes_per_token=self.bytes_per_token,
            sum_over_ranks=self.world.sum_,
        )
        self.progress.eval_loss = self.newest.loss
        values = {
            "eval_loss": self.newest.loss,
            "perplexity": self.newest.perplexity,
            "bits_per_byte": self.newest.bits_per_byte,
        }
        log.info(evaluation_line(self.progress.step, values))
        self.tracking.record(self.progress.step, values)

    def sample(self, report: StepReport | None = None, *, num_samples: int = 1) -> None:
        """Text of the model as it is now, on rank 0; the others wait at the next update."""
        if not self.world.is_main:
            return
        texts = sample(
            self.model,
            self.text.tokenizer,
            self.options.evaluation.sample_prompt,
            num_samples=num_samples,
            max_new_tokens=_SAMPLE_TOKENS,
            temperature=_SAMPLE_TEMPERATURE,
            top_k=_SAMPLE_TOP_K,
            seed=mixed(self.plan.seed, 2, self.progress.step),
        )
        for number, text in enumerate(texts, 1):
            log.info("--- sample %d of step %d ---\n%s", number, self.progress.step, text)
        self.tracking.record(self.progress.step, {"samples": texts})

    def save(self, report: StepReport | None = None) -> None:
        """A durable checkpoint, written by rank 0; `saved step N` is said when it is one."""
        if self.folder is None or self._saved_step == self.progress.step:
            return
        self._saved_step = self.progress.step
        if self.world.is_main:
            tensors, numbers = self.updater.state()
            save_checkpoint(
                self.folder.checkpoints,
                self.progress.step,
                model=self.model,
                tokenizer=self.text.tokenizer,
                tensors=tensors,
                state={
                    "progress": self.progress.state(),
                    "plan": asdict(self.plan),
                    "identity": self.text.identity(),
                    "updater": numbers,
                },
            )
            keep_newest(self.folder.checkpoints, self.options.output.save_total_limit)
            log.info("saved step %d", self.progress.step)
        self.world.barrier()

    def say_stopped(self, reason: str | None) -> None:
        """Says, and writes down, that a signal ended the run early."""
        step = self.progress.step
        kept = "; continue with --resume_from_checkpoint" if self.folder else "; nothing was kept"
        log.info("stopped by %s after step %d%s", reason or "another rank", step, kept)
        if self.folder is not None and self.world.is_main:
            self.folder.write_status("stopped", step=step, reason=reason, exit_code=75)
