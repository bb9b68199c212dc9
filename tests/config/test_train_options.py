"""Test the options of a run as keyword arguments: the same table, values and mistakes as on the command line."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path

import pytest

from llm.config.errors import UsageError
from llm.config.flags import flags_of
from llm.config.options import Options
from llm.config.reader import read_options
from llm.config.train_options import TrainOptions


def mistakes(**values: object) -> list[str]:
    with pytest.raises(UsageError) as caught:
        TrainOptions(**values)
    return str(caught.value).splitlines()


def test_options_when_given_then_equal_those_of_the_command_line() -> None:
    argv = ["--train_file", "a.txt", "b.txt", "--learning_rate", "1", "--output_dir", "runs/x", "--kfac"]
    argv += ["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--checkpointing_steps", "epoch"]
    options = TrainOptions(
        train_file=["a.txt", Path("b.txt")],
        learning_rate=1,
        output_dir=Path("runs/x"),
        kfac=True,
        lr_scheduler_kwargs={"num_cycles": 2},
        checkpointing_steps="epoch",
    )
    assert options.groups == read_options(Options, argv, prog="x", description="x")


@pytest.mark.parametrize("files", ["a.txt", Path("a.txt"), ["a.txt"], ("a.txt",)])
def test_option_of_several_values_when_given_one_then_is_a_tuple(files: object) -> None:
    assert TrainOptions(train_file=files).train_file == ("a.txt",)


def test_option_when_read_then_is_the_value_or_the_default() -> None:
    options = TrainOptions(max_train_steps=7)
    assert options.max_train_steps == 7
    assert options.learning_rate == 5e-5
    assert "learning_rate" in dir(options)


def test_option_when_unknown_then_cannot_be_read() -> None:
    with pytest.raises(AttributeError, match="no option 'max_steps'"):
        _ = TrainOptions().max_steps


def test_option_when_assigned_then_is_refused() -> None:
    options = TrainOptions()
    with pytest.raises(AttributeError):
        options.learning_rate = 1.0  # type: ignore[misc]


def test_config_when_given_then_keyword_arguments_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[data]\ndataset_name = "wikitext"\n[training]\nseed = 3\nmax_time = "1h"\n')
    options = TrainOptions(config=file, train_file="a.txt", max_time=None)
    assert options.seed == 3
    assert options.max_time is None
    # --train_file replaces the file's --dataset_name, as on the command line.
    assert options.dataset_name is None
    assert TrainOptions(config=file, train_file=None).dataset_name == "wikitext"


def test_config_when_missing_then_is_a_mistake(tmp_path: Path) -> None:
    (line,) = mistakes(config=tmp_path / "no.toml")
    assert line.startswith("--config ")
    assert line.endswith(": no such file")


def test_mistakes_when_several_then_all_are_named_with_the_nearest_name() -> None:
    assert mistakes(max_train_step=2, learning_rate="fast", optim="adam", seed=-1, weight_decay=None) == [
        "max_train_step: unknown option; did you mean max_train_steps?",
        "learning_rate='fast': must be a number >= 0",
        "optim='adam': must be one of adamw, sgd, muon; did you mean adamw?",
        "seed=-1: must be a whole number >= 0 and < 9223372036854775808",
        "weight_decay=None: must be a number >= 0",
    ]


@pytest.mark.parametrize("values", [{"seed": True}, {"seed": "1"}, {"learning_rate": float("nan")}, {"kfac": 1}])
def test_value_when_of_another_type_then_is_a_mistake(values: dict[str, object]) -> None:
    (line,) = mistakes(**values)
    assert line.startswith(f"{next(iter(values))}=")


def test_combination_when_wrong_then_is_the_mistake_of_the_command_line() -> None:
    (line,) = mistakes(streaming=True)
    assert line == "--streaming: the length of the text is unknown; give --max_train_steps"


def test_secret_when_given_then_is_not_shown() -> None:
    assert repr(TrainOptions(hub_token="hf_secret", seed=1)) == "TrainOptions(seed=1, hub_token='***')"
    (line,) = mistakes(hub_token=("hf_secret",))
    assert "hf_secret" not in line


def test_repr_when_evaluated_then_gives_equal_options() -> None:
    options = TrainOptions(seed=1, train_file="a.txt", lr_scheduler_kwargs={"num_cycles": 2}, output_dir=Path("x"))
    assert eval(repr(options)) == options  # noqa: S307 - of this test's own text
    assert pickle.loads(pickle.dumps(options)) == copy.deepcopy(options) == options
    assert options != TrainOptions(seed=2)


def test_signature_when_inspected_then_has_every_option_with_its_default() -> None:
    parameters = inspect.signature(TrainOptions).parameters
    assert list(parameters) == ["config", *flags_of(Options)]
    assert parameters["learning_rate"].default == 5e-5
