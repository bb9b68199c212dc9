"""The evaluation during a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm.config.errors import Stopped
from llm.training.callbacks.evaluation import EvaluationCallback
from llm.training.updaters.base import DataParallelRank
from tests.training.run_context import BLOCK_SIZE, make_context


@pytest.fixture
def context(tiny_gpt2: Any, byte_tokenizer: Any) -> Any:
    """A run after update 4, with evaluation batches of 2 blocks."""
    context = make_context(tiny_gpt2, byte_tokenizer, per_device_eval_batch_size=2)
    context.state.step = 4
    return context


def mean_loss(context: Any) -> float:
    """Mean cross entropy over all validation blocks."""
    ids = torch.stack([torch.from_numpy(context.validation[i].ids.astype("int64")) for i in range(8)])
    with torch.no_grad():
        logits = context.updater.model.model.eval()(ids[:, :-1]).logits
    return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_evaluation_when_run_then_has_the_mean_loss_of_the_validation_text(
    context: Any, log_lines: Callable[[], list[str]]
) -> None:
    evaluation = EvaluationCallback(context)
    evaluation.run()
    loss = mean_loss(context)
    assert evaluation.newest is not None
    assert evaluation.newest.num_tokens == 8 * BLOCK_SIZE
    assert evaluation.newest.loss == pytest.approx(loss, rel=1e-5)
    # Each of these tokens is one byte.
    assert evaluation.newest.bits_per_byte == pytest.approx(loss / torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    ((step, values),) = context.tracking.records
    assert (step, set(values)) == (4, {"eval_loss", "perplexity", "bits_per_byte"})
    assert values["eval_loss"] == context.state.eval_loss == context.state.best_eval_loss == evaluation.newest.loss
    assert (context.state.eval_step, evaluation.best_step) == (4, 4)
    assert log_lines()[0].startswith(f"eval step 4 | loss {loss:.3f} | ppl ")
    assert context.updater.calls == ["evaluation_model"]


def test_evaluation_when_repeated_after_the_same_update_then_is_recorded_once(context: Any) -> None:
    evaluation = EvaluationCallback(context)
    evaluation.run()
    evaluation.run()
    assert len(context.tracking.records) == 1
    assert evaluation.best_step == 4  # an equal loss is not better


def test_evaluation_when_an_earlier_one_was_better_then_is_not_the_best(context: Any) -> None:
    context.state.best_eval_loss = 0.5
    evaluation = EvaluationCallback(context)
    evaluation.run()
    assert evaluation.best_step is None
    assert context.state.best_eval_loss == 0.5


def test_evaluation_when_there_is_no_validation_text_then_does_nothing(tiny_gpt2: Any, byte_tokenizer: Any) -> None:
    context = make_context(tiny_gpt2, byte_tokenizer, has_validation=False)
    evaluation = EvaluationCallback(context)
    evaluation.run()
    assert (evaluation.newest, context.tracking.records, context.updater.calls) == (None, [], [])


def test_evaluation_when_there_are_two_data_parallel_ranks_then_each_reads_every_second_batch(context: Any) -> None:
    context.updater.data_parallel = DataParallelRank(rank=1, size=2)
    evaluation = EvaluationCallback(context)
    evaluation.run()
    assert evaluation.newest is not None
    assert evaluation.newest.num_tokens == 4 * BLOCK_SIZE


def test_evaluation_when_the_run_is_asked_to_stop_then_raises_and_keeps_nothing(context: Any) -> None:
    context.stop.reason = "SIGTERM"
    evaluation = EvaluationCallback(context)
    with pytest.raises(Stopped, match="SIGTERM"):
        evaluation.run()
    assert (evaluation.newest, evaluation.best_step, context.state.eval_step) == (None, None, None)
    assert context.tracking.records == []
