"""Lengths of time as people write them for schedulers."""

from __future__ import annotations

import math
import re

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_CLOCK = re.compile(r"(?:(\d+)[-:])?(\d+):(\d\d):(\d\d)")
_PART = r"(\d+(?:\.\d+)?)\s*([dhms])"
_PARTS = re.compile(rf"{_PART}(?:\s*{_PART})*")

FORMS = "minutes, 90m, 1.5h, 1:30:00 or 1-12:00:00 (days first)"


def seconds_of(text: str | float) -> float:
    """The seconds that a length of time stands for.

    Args:
        text: minutes as a number; parts with a unit (`1h30m`, `90 s`); or `H:M:S`, with days in front of it as
            Slurm (`D-H:M:S`) or Lightning (`D:H:M:S`) write them. Two numbers with a colon are refused: to some
            they are minutes and to others hours.

    Raises:
        ValueError: it is none of these, or nothing; the message says what is.
    """
    word = str(text).strip().lower()
    clock = _CLOCK.fullmatch(word)
    if clock is not None:
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        total = float(86400 * days + 3600 * hours + 60 * minutes + seconds)
    elif _PARTS.fullmatch(word):
        total = sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, word))
    else:
        try:
            total = 60 * float(word)
        except ValueError:
            two = re.fullmatch(r"(\d+):(\d+)", word)
            mend = f"write {word}:00 for hours, or {two[1]}m{two[2]}s for minutes" if two else f"give {FORMS}"
            raise ValueError(f"is no length of time; {mend}") from None
    if not 0 < total < math.inf:
        raise ValueError("must be longer than nothing, and end")
    return total
