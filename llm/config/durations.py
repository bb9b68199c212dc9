"""Durations in the forms that schedulers accept."""

from __future__ import annotations

import math
import re

_SECONDS_PER_UNIT = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_CLOCK = re.compile(r"(?:(\d+)[-:])?(\d+):(\d\d):(\d\d)")
_PART = r"(\d+(?:\.\d+)?)\s*([dhms])"
_PARTS = re.compile(rf"{_PART}(?:\s*{_PART})*")

DURATION_FORMATS = "minutes, 90m, 1.5h, 1:30:00 or 1-12:00:00 (days first)"


def parse_duration(text: str | float) -> float:
    """Return a duration in seconds.

    Args:
        text: minutes as a number; parts with a unit (`1h30m`, `90 s`); or `H:M:S`, with days in front as Slurm
            (`D-H:M:S`) or Lightning (`D:H:M:S`) write them. Two numbers with a colon are refused, because they
            may mean minutes and seconds or hours and minutes.

    Raises:
        ValueError: the text is none of these, or the duration is zero or infinite; the message names the formats.
    """
    word = str(text).strip().lower()
    clock = _CLOCK.fullmatch(word)
    if clock is not None:
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        total = float(86400 * days + 3600 * hours + 60 * minutes + seconds)
    elif _PARTS.fullmatch(word):
        total = sum(float(number) * _SECONDS_PER_UNIT[unit] for number, unit in re.findall(_PART, word))
    else:
        try:
            total = 60 * float(word)
        except ValueError:
            raise ValueError(f"not a duration; {_advice(word)}") from None
    if not 0 < total < math.inf:
        raise ValueError("must be more than zero and finite")
    return total


def _advice(word: str) -> str:
    """Return what to write in place of a word that is not a duration."""
    pair = re.fullmatch(r"(\d+):(\d+)", word)
    if pair is None:
        return f"give {DURATION_FORMATS}"
    return f"write {word}:00 for hours, or {pair[1]}m{pair[2]}s for minutes"
