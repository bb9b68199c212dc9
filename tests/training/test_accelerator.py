"""The arithmetic of a run: who chooses it, and that a resumed run keeps it."""

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
    """`start(asked, launcher=..., native=...)` starts this process's machine, on its CPU."""

    def run(asked: str = "auto", *, launcher: str | None = None, native: bool = False) -> Compute:
        monkeypatch.setattr(llm.training.accelerator, "multiplies_bf16", lambda _: native)
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        if launcher is not None:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
        return start_compute(TrainingOptions.model_validate({"use_cpu": True, "mixed_precision": asked}))

    return run


@pytest.mark.parametrize(
    ("asked", "launcher", "native", "chosen", "said"),
    [
        ("auto", None, False, "no", "fp32 (auto: no native bf16 here)"),
        ("auto", None, True, "bf16", "bf16 (auto: native here)"),
        ("auto", "no", True, "bf16", "bf16 (auto: native here)"),  # accelerate launch writes it when told nothing
        ("auto", "bf16", False, "bf16", "bf16 (the launcher's)"),
        ("no", "bf16", True, "no", "fp32"),
        ("no", "fp8", True, "no", "fp32"),
        ("bf16", "no", False, "bf16", "bf16"),
    ],
)
def test_precision_when_chosen_then_the_option_wins_over_the_launcher_and_that_over_the_device(
    start: Start, asked: str, launcher: str | None, native: bool, chosen: str, said: str
) -> None:
    machine = start(asked, launcher=launcher, native=native)
    assert machine.precision == machine.accelerator.mixed_precision == chosen
    assert str(machine).endswith(f", {said}")
    one = torch.ones(2, 2)
    with machine.accelerator.autocast():
        assert (one @ one).dtype == (torch.float32 if chosen == "no" else torch.bfloat16)


@pytest.mark.parametrize(("asked", "launcher"), [("fp16", None), ("auto", "fp16")])
def test_precision_when_a_cpu_cannot_do_it_then_is_refused(start: Start, asked: str, launcher: str | None) -> None:
    with pytest.raises(UserError, match="fp16 needs an accelerator"):
        start(asked, launcher=launcher)


def test_precision_when_the_checkpoint_has_another_then_auto_keeps_the_checkpoints(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    caplog.set_level(logging.INFO)
    machine = start(native=True)
    machine.use_checkpoint_precision(None)
    machine.use_checkpoint_precision("bf16")
    assert not caplog.messages
    machine.use_checkpoint_precision("no")
    assert caplog.messages == [
        "arithmetic: fp32, as the checkpoint's, not bf16 as auto is here; --mixed_precision changes it"
    ]
    assert machine.precision == machine.accelerator.mixed_precision == "no"
    one = torch.ones(2, 2)
    with machine.accelerator.autocast():
        assert (one @ one).dtype == torch.float32
    with pytest.raises(UserError, match="fp16 needs an accelerator"):
        start().use_checkpoint_precision("fp16")


@pytest.mark.parametrize(("asked", "launcher"), [("bf16", None), ("auto", "bf16")])
def test_precision_when_another_than_the_checkpoints_is_asked_for_then_stands_and_is_said(
    start: Start,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    launcher: str | None,
) -> None:
    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    machine = start(asked, launcher=launcher)
    machine.use_checkpoint_precision("no")
    assert machine.precision == "bf16"
    assert caplog.messages[0].startswith("the checkpoint was made in fp32, this run goes on in bf16")


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "no")])
def test_resume_when_the_machine_would_choose_otherwise_then_the_arithmetic_is_kept(
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


def test_release_when_the_heap_was_frozen_then_garbage_is_found_again(start: Start) -> None:
    machine = start("no")
    freeze_heap()
    machine.release()
    assert gc.get_freeze_count() == 0
