"""The precision of a run: where it comes from, and that a resumed run keeps it."""

from __future__ import annotations

import gc
import logging
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llm.training.accelerator
from llm.config.errors import UserError
from llm.config.options import TrainingOptions
from llm.system.garbage_collection import freeze_heap
from llm.training.accelerator import Compute, start_compute
from tests.conftest import Outcome

Start = Callable[..., Compute]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """`start(requested, launcher=..., native=...)` starts the computation of this process on its CPU."""

    def run(requested: str = "auto", *, launcher: str | None = None, native: bool = False) -> Compute:
        monkeypatch.setattr(llm.training.accelerator, "multiplies_bf16", lambda _: native)
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        if launcher is not None:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
        return start_compute(TrainingOptions.model_validate({"use_cpu": True, "mixed_precision": requested}))

    return run


@pytest.mark.parametrize(
    ("requested", "launcher", "native", "chosen", "description"),
    [
        ("auto", None, False, "no", "fp32 (auto: no native bf16 here)"),
        ("auto", None, True, "bf16", "bf16 (auto: native here)"),
        ("auto", "no", True, "bf16", "bf16 (auto: native here)"),  # accelerate launch sets it by default
        ("auto", "bf16", False, "bf16", "bf16 (the launcher's)"),
        ("no", "bf16", True, "no", "fp32"),
        ("no", "fp8", True, "no", "fp32"),
        ("bf16", "no", False, "bf16", "bf16"),
    ],
)
def test_precision_when_chosen_then_the_option_wins_over_the_launcher_and_that_over_the_device(
    start: Start, requested: str, launcher: str | None, native: bool, chosen: str, description: str
) -> None:
    compute = start(requested, launcher=launcher, native=native)
    assert compute.precision == compute.accelerator.mixed_precision == chosen
    assert str(compute).endswith(f", {description}")
    one = torch.ones(2, 2)
    with compute.accelerator.autocast():
        assert (one @ one).dtype == (torch.float32 if chosen == "no" else torch.bfloat16)


@pytest.mark.parametrize(("requested", "launcher"), [("fp16", None), ("auto", "fp16")])
def test_precision_when_the_cpu_does_not_support_it_then_is_refused(
    start: Start, requested: str, launcher: str | None
) -> None:
    with pytest.raises(UserError, match="fp16 needs an accelerator"):
        start(requested, launcher=launcher)


def test_precision_when_the_checkpoint_has_another_then_auto_takes_the_checkpoints(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    caplog.set_level(logging.INFO)
    compute = start(native=True)
    compute.use_checkpoint_precision(None)
    compute.use_checkpoint_precision("bf16")
    assert not caplog.messages
    compute.use_checkpoint_precision("no")
    (message,) = caplog.messages
    assert "fp32, as the checkpoint's" in message and "bf16" in message and "--mixed_precision" in message
    assert compute.precision == compute.accelerator.mixed_precision == "no"
    one = torch.ones(2, 2)
    with compute.accelerator.autocast():
        assert (one @ one).dtype == torch.float32
    with pytest.raises(UserError, match="fp16 needs an accelerator"):
        start().use_checkpoint_precision("fp16")


@pytest.mark.parametrize(("requested", "launcher"), [("bf16", None), ("auto", "bf16")])
def test_precision_when_another_than_the_checkpoints_is_requested_then_is_used_with_a_warning(
    start: Start,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    requested: str,
    launcher: str | None,
) -> None:
    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    compute = start(requested, launcher=launcher)
    compute.use_checkpoint_precision("no")
    assert compute.precision == "bf16"
    assert caplog.messages[0].startswith("the checkpoint was made in fp32, this run uses bf16")


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "no")])
def test_resume_when_auto_would_choose_another_precision_then_the_checkpoints_is_kept(
    train: Callable[..., Outcome],
    tiny_options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
    chosen: str,
) -> None:
    words = [*tiny_options, "--mixed_precision", "auto", "--checkpointing_steps", "2", "--output_dir", tmp_path / "run"]
    monkeypatch.setattr(llm.training.accelerator, "multiplies_bf16", lambda _: native)
    assert train(*words, "--max_train_steps", "2").code == 0
    monkeypatch.setattr(llm.training.accelerator, "multiplies_bf16", lambda _: not native)
    outcome = train(*words, "--max_train_steps", "4", "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert "as the checkpoint's" in outcome.out
    written = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert written["training"]["mixed_precision"] == chosen


def test_release_when_the_heap_was_frozen_then_is_unfrozen(start: Start) -> None:
    compute = start("no")
    freeze_heap()
    compute.release()
    assert gc.get_freeze_count() == 0
