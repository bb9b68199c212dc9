"""Durations, ages, byte sizes and counts as short text, for consoles, reports and job scripts."""

from __future__ import annotations

_COUNT_UNITS = ((1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"))
_BYTE_UNITS = ((1, "B"), (1 << 10, "KiB"), (1 << 20, "MiB"), (1 << 30, "GiB"), (1 << 40, "TiB"))
_AGE_UNITS = ((1, "s"), (60, "min"), (3600, "h"), (86400, "d"))
# From here on, three digits would round up to 1000 of the unit.
_UNIT_LIMIT = 999.5


def format_quantity(value: float) -> str:
    """Return a count or a rate with three digits and a decimal prefix: `950`, `48.2k`, `1.31M`, `5.2G`, `3T`."""
    for divisor, unit in _COUNT_UNITS:
        if value / divisor < _UNIT_LIMIT:
            return f"{value / divisor:.3g}{unit}"
    return f"{value / 1e12:.3g}T"


def format_bytes(num_bytes: int) -> str:
    """Return a size with three digits in the largest binary unit that it reaches: `512 B`, `1.5 KiB`, `2 GiB`."""
    divisor, unit = _BYTE_UNITS[0]
    for candidate in _BYTE_UNITS:
        if candidate[0] <= num_bytes:
            divisor, unit = candidate
    return f"{num_bytes / divisor:.3g} {unit}"


def format_duration(seconds: float) -> str:
    """Return a duration as `H:MM:SS`, such as `0:12:31` or `100:01:01`; fractions of a second are cut off."""
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def format_age(seconds: float) -> str:
    """Return an age, rounded, in the largest unit that it reaches: `5 s`, `12 min`, `3 h`, `2 d`; at least `1 s`."""
    seconds = max(seconds, 1)
    divisor, unit = _AGE_UNITS[0]
    for candidate in _AGE_UNITS:
        if candidate[0] <= seconds:
            divisor, unit = candidate
    return f"{seconds / divisor:.0f} {unit}"
