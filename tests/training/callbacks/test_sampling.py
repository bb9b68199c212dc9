"""Text samples during a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llm.config.errors import Stopped
from llm.models.sampling import sample
from llm.training.callbacks.sampling import SamplingCallback
from llm.training.seeding import derive_seed
from tests.training.run_context import SEED, make_context


@pytest.fixture
def context(tiny_gpt2: Any, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run after update 4; samples are 6 tokens long."""
    monkeypatch.setattr("llm.training.callbacks.sampling._SAMPLE_TOKENS", 6)
    context = make_context(tiny_gpt2, byte_tokenizer, sample_prompt="ab")
    context.state.step = 4
    return context


def test_sampling_when_run_then_texts_follow_from_seed_and_step(
    context: Any, log_lines: Callable[[], list[str]]
) -> None:
    SamplingCallback(context).run(num_samples=2)
    expected = sample(
        context.updater.model.model,
        context.dataset.tokenizer,
        "ab",
        num_samples=2,
        max_new_tokens=6,
        temperature=0.8,
        top_k=200,
        seed=derive_seed(SEED, 2, 4),
    )
    assert context.tracking.records == [(4, {"samples": expected})]
    assert all(text.startswith("ab") for text in expected)
    assert log_lines()[1] == f"--- sample 2 of step 4 ---\n{expected[1]}"
    assert context.updater.calls == ["evaluation_model"]


def test_sampling_when_an_earlier_start_recorded_the_samples_then_draws_none(context: Any) -> None:
    context.tracking.sampled = {4}
    SamplingCallback(context).run()
    assert (context.tracking.records, context.updater.calls) == ([], [])


def test_sampling_when_the_run_is_asked_to_stop_then_raises_and_records_nothing(context: Any) -> None:
    context.stop.reason = "walltime"
    with pytest.raises(Stopped, match="walltime"):
        SamplingCallback(context).run()
    assert context.tracking.records == []
