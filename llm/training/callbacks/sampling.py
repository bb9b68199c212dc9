"""Text samples of the model during a run."""

from __future__ import annotations

import logging

from llm.config.errors import Stopped
from llm.models.sampling import sample
from llm.training.context import RunContext
from llm.training.seeding import derive_seed
from llm.training.updaters.base import StepReport

log = logging.getLogger(__name__)

_SAMPLE_TOKENS = 128
_SAMPLE_TEMPERATURE = 0.8
_SAMPLE_TOP_K = 200


class SamplingCallback:
    """Writes text with the model as it is, on all ranks together: each of them may hold a part of the weights."""

    def __init__(self, context: RunContext) -> None:
        self._context = context

    def run(self, report: StepReport | None = None, *, num_samples: int = 1) -> None:
        """Draw samples, log and record them; samples that an earlier start recorded are not drawn again.

        Args:
            report: of the newest update; not used.
            num_samples: texts to draw.

        Raises:
            Stopped: on all ranks, when rank 0 was asked to stop; nothing of the samples is kept.
        """
        context = self._context
        step = context.state.step
        with context.watchdog.phase("the samples"):
            if context.world.broadcast(context.tracking.has_samples(step)):
                return
            with context.updater.evaluation_model() as model:
                texts = sample(
                    model.model,
                    context.dataset.tokenizer,
                    context.options.evaluation.sample_prompt,
                    num_samples=num_samples,
                    max_new_tokens=_SAMPLE_TOKENS,
                    temperature=_SAMPLE_TEMPERATURE,
                    top_k=_SAMPLE_TOP_K,
                    seed=derive_seed(context.plan.seed, 2, step),
                    should_stop=context.stop,
                    broadcast=context.world.broadcast_tensor if context.world.size > 1 else None,
                )
            is_stopped, reason = context.world.broadcast((context.stop(), context.stop.reason))
        if is_stopped:
            raise Stopped(reason)
        for number, text in enumerate(texts, 1):
            log.info("--- sample %d of step %d ---\n%s", number, step, text)
        context.tracking.record(step, {"samples": texts})
