"""When each callback is due, and in which order they run after an update."""

from __future__ import annotations

from dataclasses import dataclass

from llm.config.options import Options
from llm.training.callbacks.checkpointing import CheckpointingCallback
from llm.training.callbacks.evaluation import EvaluationCallback
from llm.training.callbacks.metrics import MetricsCallback
from llm.training.callbacks.sampling import SamplingCallback
from llm.training.context import RunContext
from llm.training.loop import Callback
from llm.training.plan import Plan
from llm.training.run_dir.console import ProgressBar
from llm.training.triggers import Trigger, all_of, any_of, at_end, before, every, every_epoch


@dataclass(frozen=True)
class RunCallbacks:
    """The callbacks of a run; they share its context.

    Attributes:
        metrics: writes training records, and ends a run whose gradients are no longer finite.
        evaluation: evaluates the model on the validation text.
        sampling: writes text with the model.
        checkpointing: saves checkpoints.
    """

    metrics: MetricsCallback
    evaluation: EvaluationCallback
    sampling: SamplingCallback
    checkpointing: CheckpointingCallback

    @classmethod
    def of(cls, context: RunContext) -> RunCallbacks:
        """Return the callbacks of a run."""
        evaluation = EvaluationCallback(context)
        return cls(
            metrics=MetricsCallback(context),
            evaluation=evaluation,
            sampling=SamplingCallback(context),
            checkpointing=CheckpointingCallback(context, evaluation),
        )


def scheduled_callbacks(context: RunContext, callbacks: RunCallbacks, bar: ProgressBar) -> list[Callback]:
    """Return what is done after an update, in this order.

    A checkpoint comes after the evaluation, which may make it the best one, and before the samples, which a resumed run
    repeats if they were not recorded.

    Args:
        context: the parts of the run.
        callbacks: the callbacks of the run.
        bar: advances with every update.
    """
    is_last = at_end(context.plan.num_steps)
    return [
        Callback(every(1), callbacks.metrics.check_health),
        Callback(any_of(every(context.options.output.logging_steps), is_last), callbacks.metrics.record),
        Callback(_evaluation_trigger(context.options, context.plan), callbacks.evaluation.run),
        Callback(every(1), callbacks.checkpointing.run),
        Callback(_sampling_trigger(context.options, context.plan), callbacks.sampling.run),
        Callback(every(1), bar.advance),
    ]


def repeat_interrupted(context: RunContext, callbacks: RunCallbacks) -> None:
    """If the previous start was stopped during an evaluation or while sampling, repeat it now.

    Raises:
        Stopped: on all ranks, when one was asked to stop during the evaluation, or rank 0 while sampling.
    """
    state = context.state
    if state.step == 0:
        return
    is_missing = context.validation is not None and state.eval_step != state.step
    if is_missing and _evaluation_trigger(context.options, context.plan)(state.step):
        callbacks.evaluation.run()
        callbacks.checkpointing.run()
    if _sampling_trigger(context.options, context.plan)(state.step):
        callbacks.sampling.run()  # unless the samples were recorded


def _evaluation_trigger(options: Options, plan: Plan) -> Trigger:
    interval = options.evaluation.eval_steps
    regular = every(interval) if interval else every_epoch(plan.num_blocks, plan.global_batch)
    return any_of(regular, at_end(plan.num_steps))


def _sampling_trigger(options: Options, plan: Plan) -> Trigger:
    return all_of(every(options.evaluation.sample_steps), before(plan.num_steps))
