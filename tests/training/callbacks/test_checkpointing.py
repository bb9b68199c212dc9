"""When a checkpoint is due, and what is handed to the saver."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.training.callbacks.checkpointing import CheckpointingCallback
from llm.training.callbacks.evaluation import EvaluationCallback
from llm.training.checkpoints.store import NotFiniteError, open_checkpoint
from llm.training.updaters.base import StepReport, VoteResult
from tests.training.run_context import RecordingSaver, make_context

Parts = tuple[Any, RecordingSaver, CheckpointingCallback, EvaluationCallback]


NO_REQUESTS = VoteResult()


def report(votes: VoteResult | None = NO_REQUESTS) -> StepReport:
    return StepReport(loss=1.0, grad_norm=torch.tensor(1.0), lr=1e-3, votes=votes)


@pytest.fixture
def parts(tiny_gpt2: Any, byte_tokenizer: Any, tmp_path: Path) -> Parts:
    """Context, saver and callbacks of a run of 10 updates with a checkpoint every 4."""
    saver = RecordingSaver()
    context = make_context(tiny_gpt2, byte_tokenizer, run_dir=tmp_path / "run", saver=saver, checkpointing_steps=4)
    evaluation = EvaluationCallback(context)
    return context, saver, CheckpointingCallback(context, evaluation), evaluation


def reasons(saver: RecordingSaver) -> list[list[str]]:
    return [save["reasons"] for save in saver.saves]


@pytest.mark.parametrize(
    ("step", "requests", "votes", "best_step", "expected"),
    [
        (3, [], VoteResult(), None, []),
        (4, [], VoteResult(), None, [["regular"]]),
        (4, [], None, None, [["regular"]]),  # an update without votes
        (10, [], VoteResult(), None, [["end"]]),
        (3, ["timed"], VoteResult(save=True), None, [["timed"]]),
        (3, [], VoteResult(save=True), None, [["asked"]]),  # another rank asked for it
        (3, ["timed"], VoteResult(), None, []),  # requested since the ranks voted: the next update saves it
        (3, [], VoteResult(), 3, [["best"]]),
        (3, [], VoteResult(), 2, []),
        (4, ["timed", "asked"], VoteResult(save=True), 4, [["regular", "timed", "asked", "best"]]),
    ],
)
def test_run_when_an_update_ends_then_saves_for_every_reason_that_holds(
    step: int,
    requests: list[str],
    votes: VoteResult | None,
    best_step: int | None,
    expected: list[list[str]],
    parts: Parts,
) -> None:
    context, saver, checkpointing, evaluation = parts
    context.state.step = step
    saver.request = requests
    assert checkpointing.should_save() is bool(requests)
    evaluation.best_step = best_step
    checkpointing.run(report(votes))
    assert reasons(saver) == expected
    assert context.updater.calls == (["state", "full_weights"] if expected else [])


def test_run_when_saved_then_the_saver_has_all_weights_once_and_the_updater_tensors(parts: Parts) -> None:
    context, saver, checkpointing, _ = parts
    context.state.step = 4
    checkpointing.run(report())
    checkpointing.run(report())
    (save,) = saver.saves
    assert save["step"] == 4
    assert set(save["weights"]) == set(context.updater.model.model.state_dict()) - {"lm_head.weight"}  # it is tied
    assert save["tensors"]["transformer.wte.weight/momentum"].tolist() == [0, 1, 2, 3]


def test_run_when_an_earlier_start_made_the_update_then_asks_the_saver_for_requests(parts: Parts) -> None:
    context, saver, checkpointing, _ = parts
    context.state.step = 3
    checkpointing.run()
    assert saver.saves == []
    saver.request = ["asked"]
    checkpointing.run()
    assert reasons(saver) == [["asked"]]


def test_run_when_a_rank_has_no_saver_then_gives_its_parts_all_the_same(
    tiny_gpt2: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    context = make_context(tiny_gpt2, byte_tokenizer, run_dir=tmp_path / "run", checkpointing_steps=4)
    checkpointing = CheckpointingCallback(context, EvaluationCallback(context))
    assert not checkpointing.should_save()
    context.state.step = 4
    checkpointing.run(report())
    assert context.updater.calls == ["state", "full_weights"]  # iterated to the end


def test_run_when_nothing_is_kept_then_does_nothing(tiny_gpt2: Any, byte_tokenizer: Any) -> None:
    context = make_context(tiny_gpt2, byte_tokenizer, checkpointing_steps=1)
    checkpointing = CheckpointingCallback(context, EvaluationCallback(context))
    context.state.step = 4
    checkpointing.run(report())
    checkpointing.save_last("end")
    assert context.updater.calls == []


def test_epochs_when_checkpoints_are_saved_after_each_then_the_update_that_ends_one_is_saved(
    tiny_gpt2: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    saver = RecordingSaver()
    options = {"checkpointing_steps": "epoch", "max_train_steps": 25}  # an epoch has 10 updates
    context = make_context(tiny_gpt2, byte_tokenizer, run_dir=tmp_path / "run", saver=saver, **options)
    checkpointing = CheckpointingCallback(context, EvaluationCallback(context))
    for step in range(1, 26):
        context.state.step = step
        checkpointing.run(report())
    assert [(save["step"], save["reasons"]) for save in saver.saves] == [
        (10, ["regular"]), (20, ["regular"]), (25, ["end"]),
    ]  # fmt: skip


def test_save_last_when_the_newest_update_is_saved_already_then_only_waits(parts: Parts) -> None:
    context, saver, checkpointing, _ = parts
    context.state.step = 3
    checkpointing.save_last("stop")
    assert reasons(saver) == [["stop"]]
    num_waits = saver.num_waits
    checkpointing.save_last("end")
    assert reasons(saver) == [["stop"]]
    assert saver.num_waits > num_waits


def test_save_last_when_the_newest_save_was_skipped_then_raises_its_reason(parts: Parts) -> None:
    context, saver, checkpointing, _ = parts
    saver.step = 2
    saver.skipped_because = NotFiniteError("step 2 is not saved")
    context.state.step = 3
    checkpointing.save_last("end")  # the skipped save was that of an older update
    saver.skipped_because = NotFiniteError("step 3 is not saved")
    with pytest.raises(NotFiniteError, match="step 3"):
        checkpointing.save_last("end")


def test_write_when_called_then_the_checkpoint_holds_the_counters_of_the_time_of_the_save(parts: Parts) -> None:
    context, saver, checkpointing, _ = parts
    context.state.step = 4
    context.state.tokens = 128
    checkpointing.run(report())
    (save,) = saver.saves
    expected = context.state.to_json()
    context.state.step = 5  # the training continues while the thread writes
    save["write"](weights=save["weights"], tensors=save["tensors"])
    checkpoint = open_checkpoint(context.run_dir.checkpoints / "step_4")
    assert checkpoint.state["progress"] == expected
    assert checkpoint.state["plan"] == asdict(context.plan)
    assert checkpoint.state["reasons"] == ["regular"]
    assert checkpoint.state["identity"] == {
        "data_hash": "hash of the text",
        "tokenizer_hash": "hash of the tokenizer",
    }
    assert checkpoint.state["updater"] == {"optimizer": "recording"}
    assert (checkpoint.state["mixed_precision"], checkpoint.state["world"]) == (
        "no",
        {"num_processes": 1, "num_nodes": 1},
    )


@pytest.mark.parametrize("reason", ["SIGTERM", None])
def test_stop_when_updates_were_made_then_saves_them_and_records_the_reason(
    reason: str | None, parts: Parts, log_lines: Callable[[], list[str]]
) -> None:
    context, saver, checkpointing, _ = parts
    context.state.step = 3
    context.stop.reason = reason
    checkpointing.stop()
    assert reasons(saver) == [["stop"]]
    status = json.loads(context.run_dir.status.read_text())
    expected = reason or "another rank"
    assert {key: status[key] for key in ("state", "step", "reason", "exit_code")} == {
        "state": "stopped", "step": 3, "reason": expected, "exit_code": 75,
    }  # fmt: skip
    assert f"stopped by {expected} after step 3" in log_lines()[-1]
    assert "--resume_from_checkpoint" in log_lines()[-1]


def test_stop_when_no_update_was_made_then_saves_nothing(parts: Parts) -> None:
    context, saver, checkpointing, _ = parts
    context.stop.reason = "SIGINT"
    checkpointing.stop()
    assert saver.saves == []
    assert json.loads(context.run_dir.status.read_text())["step"] == 0
