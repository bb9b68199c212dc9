"""The options of a table as flags: names, values that are allowed, and how they are read."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import create_model

from llm.config.flags import flags_of, groups_of
from llm.config.option import OptionGroup, option
from llm.config.options import Options

FLAGS = flags_of(Options)


def test_flags_of_when_two_groups_share_a_name_then_it_refuses() -> None:
    one = create_model("One", __base__=OptionGroup, seed=(int, option(1, "a seed")))
    two = create_model("Two", __base__=OptionGroup, seed=(int, option(1, "a seed")))
    both = create_model("Both", __base__=OptionGroup, one=(one, one()), two=(two, two()))
    with pytest.raises(TypeError, match="seed"):
        flags_of(both)
    with pytest.raises(TypeError, match="config"):
        flags_of(create_model("Reserved", __base__=OptionGroup, config=(int, option(1, "x"))))


def test_groups_of_when_the_table_is_a_single_group_then_it_is_the_only_one() -> None:
    single = create_model("Single", __base__=OptionGroup, seed=(int, option(1, "a seed")))
    assert groups_of(single) == {"": single}
    assert flags_of(single)["seed"].key == "seed"
    assert list(groups_of(Options)) == list(Options.model_fields)
    assert FLAGS["seed"].key == "training.seed"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("learning_rate", "a number >= 0"),
        ("min_lr_ratio", "a number >= 0 and <= 1"),
        ("optim", "one of adamw, sgd, muon"),
        ("checkpointing_steps", "a whole number, or epoch"),
        ("train_file", "text (one or several)"),
        ("use_cpu", "true or false"),
        ("lr_scheduler_kwargs", "a table (on the command line a JSON object)"),
    ],
)
def test_allowed_when_an_option_has_types_bounds_and_choices_then_names_all(name: str, allowed: str) -> None:
    assert FLAGS[name].allowed == allowed


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("seed", ["3"], 3),
        ("learning_rate", ["3"], 3.0),
        ("use_cpu", [], True),
        ("use_cpu", ["No"], False),
        ("resume_from_checkpoint", [], True),
        ("resume_from_checkpoint", ["no"], "no"),
        ("checkpointing_steps", ["epoch"], "epoch"),
        ("train_file", ["a", "b"], ("a", "b")),
        ("lr_scheduler_kwargs", ['{"power": 2}'], {"power": 2}),
    ],
)
def test_parse_words_when_they_fit_the_type_then_returns_the_value(name: str, words: list[str], expected: Any) -> None:
    value = FLAGS[name].parse_words(words)
    assert (type(value), value) == (type(expected), expected)


@pytest.mark.parametrize(
    ("name", "words"),
    [("seed", []), ("seed", ["3.0"]), ("use_cpu", ["maybe"]), ("optim", ["adam"]), ("run_name", ["\udcff"])],
)
def test_parse_words_when_they_do_not_fit_the_type_then_refused(name: str, words: list[str]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        FLAGS[name].parse_words(words)


def test_convert_toml_when_arrays_texts_or_json_then_the_type_of_the_option() -> None:
    assert FLAGS["train_file"].convert_toml(["a", "b"]) == ("a", "b")
    assert FLAGS["train_file"].convert_toml("a") == ("a",)
    assert FLAGS["lr_scheduler_kwargs"].convert_toml('{"lr_end": null}') == {"lr_end": None}
    assert FLAGS["lr_scheduler_kwargs"].convert_toml("{") == "{"
    assert FLAGS["seed"].convert_toml(3) == 3
