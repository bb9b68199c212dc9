"""`--train_dir A=0.7 B=0.3`: folders and weights."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from llm.config.errors import UsageError
from llm.config.options import Options
from llm.config.reader import read_options
from llm.config.weighted_dirs import parse_weighted_dirs


def _read(*words: str) -> list[tuple[str, Fraction | None]]:
    return [(folder.name, folder.weight) for folder in parse_weighted_dirs(words)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("a",), [("a", None)]),
        ((), []),
        (("a=0.7", "b=0.3"), [("a", Fraction(7, 10)), ("b", Fraction(3, 10))]),
        (("a=7", "b=3"), [("a", Fraction(7, 10)), ("b", Fraction(3, 10))]),
        (("a=1e-1", "b=.1", "c=0.2"), [("a", Fraction(1, 4)), ("b", Fraction(1, 4)), ("c", Fraction(1, 2))]),
        (("a", "b", "c"), [("a", None), ("b", None), ("c", None)]),
        (("run=3/data=2", "x=y=1"), [("run=3/data", Fraction(2, 3)), ("x=y", Fraction(1, 3))]),
        (("lr=small", "b="), [("lr=small", None), ("b=", None)]),
        (("a=nan", "b=inf", "c=1e999"), [("a=nan", None), ("b=inf", None), ("c=1e999", None)]),
    ],
)  # fmt: skip
def test_parse_weighted_dirs_when_words_end_in_a_number_then_it_is_the_weight(
    words: tuple[str, ...], expected: list[tuple[str, Fraction | None]]
) -> None:
    assert _read(*words) == expected


def test_parse_weighted_dirs_when_a_folder_has_the_entire_name_then_there_is_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _read("lr=3", "b=1") == [("lr", Fraction(3, 4)), ("b", Fraction(1, 4))]
    (tmp_path / "lr=3").mkdir()
    assert _read("lr=3") == [("lr=3", None)]
    assert _read("lr=3=2", "b=2") == [("lr=3", Fraction(1, 2)), ("b", Fraction(1, 2))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a=0", "b=1"), "--train_dir a=0: a weight must be above 0"),
        (("a=-0.5", "b=1"), "--train_dir a=-0.5: a weight must be above 0"),
        (("a=0.5", "b"), "--train_dir b: has no weight, but others have one; write b=0.5"),
        (("a=0.5", "b=0.2", "a=0.3"), "--train_dir a: is named twice"),
        (("a", "a"), "--train_dir a: is named twice"),
    ],
)
def test_train_dir_when_the_weights_are_wrong_then_usage_error_of_one_line(
    words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        read_options(Options, ["--train_dir", *words], prog="x", description="x")
    assert str(refusal.value).startswith(message)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("toml", "expected"),
    [('"x"', ("x",)), ('["x"]', ("x",)), ('["a=0.7", "b=0.3"]', ("a=0.7", "b=0.3"))],
)
def test_train_dir_when_in_a_toml_file_then_a_text_or_a_list(
    toml: str, expected: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "x.toml").write_text(f"[data]\ntrain_dir = {toml}\n")
    options = read_options(Options, ["--config", str(tmp_path / "x.toml")], prog="x", description="x")
    assert options.data.train_dir == expected
    assert read_options(Options, ["--train_dir", *expected], prog="x", description="x") == options
    joined = read_options(Options, [f"--train_dir={expected[0]}"], prog="x", description="x")
    assert joined.data.train_dir == expected[:1]
