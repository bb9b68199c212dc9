"""Durations, ages, sizes and counts as text."""

from __future__ import annotations

import pytest

from llm.system.units import format_age, format_bytes, format_duration, format_quantity


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (7.25, "7.25"), (950, "950"), (48_200, "48.2k"), (1.314e6, "1.31M"), (5.2e9, "5.2G"), (3e12, "3T")],
)
def test_format_quantity_when_large_then_has_three_digits_and_a_unit(value: float, expected: str) -> None:
    assert format_quantity(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(999.6, "1k"), (999_600, "1M"), (999.7e6, "1G"), (999.4, "999")])
def test_format_quantity_when_rounding_reaches_the_next_unit_then_takes_it(value: float, expected: str) -> None:
    assert format_quantity(value) == expected


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1023, "1.02e+03 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (3 * 2**20, "3 MiB"),
        (5 * 2**29, "2.5 GiB"),
        (2**40, "1 TiB"),
        (2**50, "1.02e+03 TiB"),
    ],
)
def test_format_bytes_when_large_then_has_three_digits_and_a_binary_unit(num_bytes: int, expected: str) -> None:
    assert format_bytes(num_bytes) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0:00:00"), (59.9, "0:00:59"), (3600, "1:00:00"), (360_061, "100:01:01")]
)
def test_format_duration_when_long_then_hours_exceed_a_day(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-3, "1 s"),
        (0.2, "1 s"),
        (5.4, "5 s"),
        (59.9, "60 s"),
        (60, "1 min"),
        (3599, "60 min"),
        (7200, "2 h"),
        (86399, "24 h"),
        (86400, "1 d"),
        (10 * 86400, "10 d"),
    ],
)
def test_format_age_when_given_seconds_then_takes_the_largest_unit_reached(seconds: float, expected: str) -> None:
    assert format_age(seconds) == expected
