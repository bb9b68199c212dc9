"""Splitting of a command line into flags and their words."""

from __future__ import annotations

import pytest

from llm.config.argv import ParsedFlag, parse_argv
from llm.config.flags import flags_of
from llm.config.options import Options

FLAGS = flags_of(Options)


def flag(word: str, name: str, *values: str) -> ParsedFlag:
    return ParsedFlag(word, (name,), values)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--seed 1 --use_cpu", [flag("--seed", "seed", "1"), flag("--use_cpu", "use_cpu")]),
        ("--train_file a b --seed 1", [flag("--train_file", "train_file", "a", "b"), flag("--seed", "seed", "1")]),
        ("--use-cpu false", [flag("--use-cpu", "use_cpu", "false")]),
        ("--use_cpu a.txt", [flag("--use_cpu", "use_cpu"), ParsedFlag("", (), ("a.txt",))]),
        ("--resume_from_checkpoint --use_cpu", [flag("--resume_from_checkpoint", "resume_from_checkpoint"),
                                                flag("--use_cpu", "use_cpu")]),
        ("--resume_from_checkpoint best", [flag("--resume_from_checkpoint", "resume_from_checkpoint", "best")]),
        ("--learning_rate -1e-3", [flag("--learning_rate", "learning_rate", "-1e-3")]),
        ("--run_name=-x=y", [ParsedFlag("--run_name", ("run_name",), ("-x=y",), joined=True)]),
        ("--config a.toml b", [flag("--config", "config", "a.toml"), ParsedFlag("", (), ("b",))]),
        ("-h x", [flag("-h", "help"), ParsedFlag("", (), ("x",))]),
        ("--sede 1 2", [ParsedFlag("--sede", (), ("1", "2"))]),
        ("--hub x", [ParsedFlag("--hub", ("hub_model_id", "hub_token"), ("x",))]),
        ("a -- --seed", [ParsedFlag("", (), ("a",)), ParsedFlag("--", (), ("--seed",))]),
    ],
)  # fmt: skip
def test_parse_argv_when_words_follow_a_flag_then_the_flag_takes_as_many_as_its_type(
    argv: str, expected: list[ParsedFlag]
) -> None:
    assert parse_argv(argv.split(), FLAGS) == expected


def test_parse_argv_when_a_value_has_blanks_then_it_is_not_a_flag() -> None:
    assert parse_argv(["--sample_prompt", "- a list"], FLAGS) == [flag("--sample_prompt", "sample_prompt", "- a list")]
