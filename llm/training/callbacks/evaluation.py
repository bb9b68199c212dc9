"""The evaluation of the model on the validation text during a run."""

from __future__ import annotations

import logging

from llm.config.errors import Stopped
from llm.data.batches.loader import evaluation_batches
from llm.distributed.votes import DelayedVote
from llm.evaluation.perplexity import Evaluation, evaluate
from llm.training.context import RunContext
from llm.training.run_dir.formatting import evaluation_line
from llm.training.updaters.base import StepReport

log = logging.getLogger(__name__)


class EvaluationCallback:
    """Evaluates on all ranks, and knows which evaluation was the best.

    Attributes:
        newest: the last evaluation of this start; None before the first.
        best_step: the update after which this start made the best evaluation of the whole run; None if it made none.
    """

    def __init__(self, context: RunContext) -> None:
        self.newest: Evaluation | None = None
        self.best_step: int | None = None
        self._context = context
        self._token_bytes, self._bytes_per_token = context.dataset.bytes_of_ids()

    def run(self, report: StepReport | None = None) -> None:
        """Measure loss, perplexity and bits per byte of the validation text, on all ranks; nothing without one.

        Raises:
            Stopped: on all ranks, when one was asked to stop; nothing of what was measured is kept.
        """
        context = self._context
        evaluation = self._evaluate()
        if evaluation is None:
            return
        self.newest = evaluation
        # A run that is resumed at its very end has its record already.
        is_new = context.state.eval_step != context.state.step
        if context.state.add_evaluation(evaluation.loss):
            self.best_step = context.state.step
        values = {
            "eval_loss": evaluation.loss,
            "perplexity": evaluation.perplexity,
            "bits_per_byte": evaluation.bits_per_byte,
        }
        log.info(evaluation_line(context.state.step, values))
        if is_new:
            context.tracking.record(context.state.step, values)

    def _evaluate(self) -> Evaluation | None:
        """Return the evaluation of the weights as they are; None where there is no validation text."""
        context = self._context
        if context.validation is None:
            return None
        updater = context.updater
        batches = evaluation_batches(
            context.validation,
            batch_size=context.options.evaluation.per_device_eval_batch_size,
            rank=updater.data_parallel.rank,
            num_ranks=updater.data_parallel.size,
            max_batches=context.options.evaluation.max_eval_batches,
            device=context.world.device,
        )
        vote = DelayedVote(context.world)
        with context.watchdog.phase("the evaluation"), updater.evaluation_model() as model:
            evaluation = evaluate(
                model,
                batches,
                device=context.world.device,
                token_bytes=self._token_bytes,
                bytes_per_token=self._bytes_per_token,
                sum_over_ranks=context.world.all_reduce_sum,
                should_stop=lambda: vote(context.stop()),
            )
            vote.last()
        if evaluation is None:
            raise Stopped(context.stop.reason if context.stop() else "another rank")
        return evaluation
