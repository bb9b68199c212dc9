"""Durations in the forms that schedulers accept."""

from __future__ import annotations

import pytest

from llm.config.durations import parse_duration
from llm.config.errors import UsageError
from llm.config.options import Options
from llm.config.reader import read_options


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1:30:00", 5400),
        ("00:00:01", 1),
        ("100:00:00", 360_000),
        ("1-12:00:00", 129_600),
        ("01:12:00:00", 129_600),
        ("90", 5400),
        (90, 5400),
        (0.5, 30),
        ("90m", 5400),
        ("1.5h", 5400),
        ("1h30m", 5400),
        ("1h 30m 5s", 5405),
        ("2D", 172_800),
        (" 45 s ", 45),
    ],
)
def test_parse_duration_when_written_in_a_known_form_then_returns_seconds(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "1:3:00", "1:30:0", "5x", "m", "-5", "0", "0:00:00", "nan", "inf", "1e400"]
)
def test_parse_duration_when_the_text_is_no_duration_then_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a duration|more than zero"):
        parse_duration(text)


def test_parse_duration_when_minutes_or_hours_may_be_meant_then_names_both_readings() -> None:
    with pytest.raises(ValueError, match=r"write 1:30:00 for hours, or 1m30s for minutes"):
        parse_duration("1:30")


def test_max_time_when_it_is_wrong_then_is_one_line_of_usage() -> None:
    with pytest.raises(UsageError, match=r"--max_time 1:30: not a duration; write") as mistake:
        read_options(Options, ["--max_time", "1:30"], prog="p", description="d")
    assert "\n" not in str(mistake.value)


def test_max_time_when_given_as_number_or_text_then_both_are_kept() -> None:
    for word, value in (("90", 90), ("1.5h", "1.5h")):
        options = read_options(Options, ["--max_time", word], prog="p", description="d")
        assert options.training.max_time == value
