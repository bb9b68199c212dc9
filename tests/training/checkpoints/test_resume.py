"""Where a run starts, and which checkpoints it refuses to continue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import llm.training.checkpoints.resume
from llm.config.errors import UserError
from llm.config.options import ModelOptions, Options
from llm.config.reader import read_keywords
from llm.training.checkpoints.external import ExternalCheckpoint
from llm.training.checkpoints.resume import Start, as_restarted, choose_start
from llm.training.checkpoints.store import Checkpoint
from llm.training.plan import Plan
from llm.training.state import TrainState

PLAN = Plan(
    block_size=8, num_blocks=40, micro_batch=4, accumulation=1, global_batch=4, num_steps=10, seed=7, num_unread=0
)
IDENTITY = {"data_hash": "a", "revision": "me/text@abc"}
DATASET: Any = SimpleNamespace(identity=lambda: IDENTITY)


def options(**values: Any) -> Options:
    return read_keywords(Options, values)


def checkpoint(path: Path = Path("run/checkpoints/step_4"), **state: Any) -> Checkpoint:
    """Return a checkpoint of update 4 of a run with PLAN; nothing is on disk."""
    facts = {"plan": asdict(PLAN), "identity": IDENTITY, "updater": {}, "progress": TrainState(step=4).to_json()}
    return Checkpoint(path, 4, facts | state)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`found.checkpoint` is what `find_checkpoint` returns."""
    result = SimpleNamespace(checkpoint=None)
    monkeypatch.setattr(llm.training.checkpoints.resume, "find_checkpoint", lambda *_: result.checkpoint)
    return result


def test_start_when_there_is_no_checkpoint_then_is_fresh(
    found: SimpleNamespace, log_lines: Callable[[], list[str]]
) -> None:
    given = options(seed=5, model_type="llama", output_dir="run", resume_from_checkpoint=True)
    start = choose_start(given, Path("run/checkpoints"))
    assert start == Start(None, 5, given.model)
    assert log_lines() == ["resume: no checkpoint yet, a fresh run"]
    assert start.resume(SimpleNamespace()) == TrainState()  # type: ignore[arg-type]
    assert (start.precision, start.dataset_revision("me/text"), start.with_global_batch(given)) == (None, None, given)


def test_start_when_no_seed_is_given_then_each_fresh_run_draws_one(found: SimpleNamespace) -> None:
    assert choose_start(options(), None).seed != choose_start(options(), None).seed


def test_start_when_there_is_a_checkpoint_then_model_seed_and_global_batch_are_its_own(
    found: SimpleNamespace,
) -> None:
    found.checkpoint = checkpoint()
    given = options(model_type="llama", config_overrides="num_hidden_layers=1", output_dir="run")
    start = choose_start(given, Path("run/checkpoints"))
    assert start.seed == 7
    assert start.model.model_name_or_path == str(found.checkpoint.path)
    assert (start.model.config_name, start.model.config_overrides) == (None, None)
    assert start.with_global_batch(given).training.global_batch_size == 4
    assert choose_start(options(seed=9), None).seed == 9  # `check` refuses it then


def test_global_batch_when_the_options_name_one_then_is_kept() -> None:
    given = options(global_batch_size=8)
    assert Start(checkpoint(), 7, given.model).with_global_batch(given) is given


def test_start_when_the_checkpoint_is_external_then_the_seed_is_that_of_this_run(
    found: SimpleNamespace, tmp_path: Path
) -> None:
    found.checkpoint = ExternalCheckpoint(tmp_path, 3, tmp_path / "model.safetensors", None)
    given = options(seed=5, model_type="llama")
    start = choose_start(given, None)
    assert (start.seed, start.model, start.precision) == (5, given.model, None)


@pytest.mark.parametrize(("state", "precision"), [({}, "no"), ({"mixed_precision": "bf16"}, "bf16")])
def test_precision_when_the_checkpoint_is_older_than_the_option_then_is_fp32(
    state: dict[str, str], precision: str
) -> None:
    assert Start(checkpoint(**state), 7, ModelOptions()).precision == precision


@pytest.mark.parametrize(("name", "revision"), [("me/text", "abc"), ("me/other", None), (None, None)])
def test_revision_when_the_same_dataset_is_named_then_is_that_of_the_checkpoint(
    name: str | None, revision: str | None
) -> None:
    assert Start(checkpoint(), 7, ModelOptions()).dataset_revision(name) == revision


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"seed": 8}, "--seed 7"),
        ({"block_size": 16}, "--block_size 8"),
        ({"global_batch": 8}, "--global_batch_size 4"),
        ({"document_mask": True}, "--document_mask False"),
    ],
)
def test_check_when_the_plan_differs_then_is_refused_with_the_option(change: dict[str, Any], option: str) -> None:
    with pytest.raises(UserError, match=option):
        Start(checkpoint(), 7, ModelOptions()).check(replace(PLAN, **change), DATASET)


def test_check_when_only_the_split_of_the_global_batch_differs_then_is_accepted() -> None:
    Start(checkpoint(), 7, ModelOptions()).check(replace(PLAN, micro_batch=1, accumulation=4), DATASET)


def test_check_when_the_checkpoint_is_older_than_document_masks_then_it_had_none() -> None:
    plan = asdict(PLAN)
    del plan["document_mask"]
    start = Start(checkpoint(plan=plan), 7, ModelOptions())
    start.check(PLAN, DATASET)
    with pytest.raises(UserError, match="--document_mask"):
        start.check(replace(PLAN, document_mask=True), DATASET)


def test_check_when_the_text_differs_then_is_refused() -> None:
    with pytest.raises(UserError, match="step_4 was made on other text"):
        Start(checkpoint(identity={"data_hash": "b"}), 7, ModelOptions()).check(PLAN, DATASET)


def test_check_when_the_number_of_updates_differs_then_warns_or_refuses(log_lines: Callable[[], list[str]]) -> None:
    start = Start(checkpoint(), 7, ModelOptions())
    start.check(replace(PLAN, num_steps=20), DATASET)
    (line,) = log_lines()
    assert "10 updates" in line and "20 now" in line
    with pytest.raises(UserError, match="step 4, beyond the 3"):
        start.check(replace(PLAN, num_steps=3), DATASET)


class Loader:
    """Takes the state of a checkpoint, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def load(self, reader: Any) -> None:
        if self.error is not None:
            raise self.error
        self.numbers = reader.numbers
        self.momentum = reader.read("a/momentum")


def test_resume_when_the_updater_loads_then_the_counters_are_restored(
    tmp_path: Path, log_lines: Callable[[], list[str]]
) -> None:
    save_file({"a/momentum": torch.ones(2)}, tmp_path / "optimizer.safetensors")
    progress = TrainState(step=4, tokens=128, best_eval_loss=1.5)
    resumed = checkpoint(tmp_path, progress=progress.to_json(), updater={"optimizer": "SGD"})
    updater: Any = Loader()
    assert Start(resumed, 7, ModelOptions()).resume(updater) == progress
    assert updater.numbers == {"optimizer": "SGD"}
    assert torch.equal(updater.momentum, torch.ones(2))
    assert log_lines() == [f"resumed from step 4 ({tmp_path})"]


@pytest.mark.parametrize("error", [KeyError("b"), ValueError("it was SGD"), RuntimeError("size mismatch")])
def test_resume_when_the_updater_refuses_the_state_then_the_options_that_decide_it_are_named(
    error: Exception, tmp_path: Path
) -> None:
    save_file({"a/momentum": torch.ones(2)}, tmp_path / "optimizer.safetensors")
    updater: Any = Loader(error)
    with pytest.raises(UserError, match=r"--optim or --kfac \(.*(b|SGD|size)"):
        Start(checkpoint(tmp_path), 7, ModelOptions()).resume(updater)


def test_restart_when_torchrun_starts_the_run_again_then_it_resumes_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(output_dir=str(tmp_path), overwrite_output_dir=True)
    checkpoints = tmp_path / "checkpoints"
    assert as_restarted(given, checkpoints) is given
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    output = as_restarted(given, checkpoints).output
    assert (output.resume_from_checkpoint, output.overwrite_output_dir) == (True, False)
    # A checkpoint that is named by its path counts until the run has one of its own.
    named = options(output_dir=str(tmp_path), resume_from_checkpoint="other/step_8")
    assert as_restarted(named, checkpoints).output.resume_from_checkpoint == "other/step_8"
    (checkpoints / "step_2").mkdir(parents=True)
    assert as_restarted(named, checkpoints).output.resume_from_checkpoint is True
