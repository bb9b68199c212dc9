"""The trainer that is started, and its options as the launcher reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm.clusters.trainer_command import DEFAULT_MODULE, check_chain, read_trainer_command
from llm.config.errors import UsageError

RESUMABLE = ["--output_dir", "runs/a", "--resume_from_checkpoint"]


def test_trainer_when_no_module_is_named_then_is_the_default_with_parsed_options() -> None:
    trainer = read_trainer_command(["--output_dir", "~/runs/a", "--max_train_steps", "3"])
    assert trainer.module == DEFAULT_MODULE
    assert trainer.arguments == ("--output_dir", "~/runs/a", "--max_train_steps", "3")
    assert trainer.options is not None
    assert trainer.options.training.max_train_steps == 3
    assert trainer.run_dir == Path.home() / "runs" / "a"
    assert trainer.keeps_status


def test_trainer_when_a_module_is_named_then_its_options_are_not_parsed() -> None:
    trainer = read_trainer_command(["json.tool", "--no-such-option"])
    assert (trainer.module, trainer.arguments, trainer.options) == ("json.tool", ("--no-such-option",), None)
    assert trainer.run_dir is None
    assert not trainer.keeps_status


@pytest.mark.parametrize("words", [[], ["--output_dir", "runs/a", "--dry_run"]])
def test_trainer_when_it_keeps_nothing_then_writes_no_status(words: list[str]) -> None:
    assert not read_trainer_command(words).keeps_status


@pytest.mark.parametrize("module", ["llm.trainers.gtp", "llm.trainers", "no_such_package.module", "llm..gpt"])
def test_trainer_when_its_module_cannot_be_run_then_is_refused(module: str) -> None:
    with pytest.raises(UsageError, match="there is no module of that name"):
        read_trainer_command([module])


def test_trainer_when_an_option_is_wrong_then_is_refused_here() -> None:
    with pytest.raises(UsageError, match="--learning_rate"):
        read_trainer_command(["--lerning_rate", "1"])


def test_chain_when_each_job_can_resume_then_is_accepted() -> None:
    check_chain(read_trainer_command(RESUMABLE))
    check_chain(read_trainer_command(RESUMABLE[:2]), resumes=True)


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["json.tool"], "json.tool"),
        (["--resume_from_checkpoint"], "--output_dir"),
        (RESUMABLE[:2], "--resume_from_checkpoint"),
        (["--output_dir", "runs/a", "--overwrite_output_dir"], "--overwrite_output_dir"),
    ],
)
def test_chain_when_the_second_job_could_not_resume_then_is_refused(words: list[str], missing: str) -> None:
    with pytest.raises(UsageError, match=missing):
        check_chain(read_trainer_command(words))
