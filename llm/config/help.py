"""The page that `--help` prints: every option by table, its value, its meaning, its default."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import Any

from llm.config.flags import Flag, flags_of, groups_of
from llm.config.option import OptionGroup

INDENT = 26
LONGEST_LIST_OF_CHOICES = 40


def help_text(table: type[OptionGroup], *, prog: str, description: str) -> str:
    """The page, as wide as the terminal, ending in a line break."""
    width = max(40, shutil.get_terminal_size().columns - 2)
    flags = list(flags_of(table).values())
    groups = groups_of(table)
    words = "".join(f" {_value(flag)}" if flag.required else f" [{_value(flag)}]" for flag in flags if flag.positional)
    kind = "flat" if "" in groups else "by table"
    parts = [
        f"usage: {prog}{words} [--config FILE.toml] [--OPTION VALUE ...]",
        textwrap.fill(description, width),
        "General",
        _entry("--config FILE.toml", f"options from a file, {kind}; flags win over it", width),
        _entry("--help, -h", "print this page and stop", width),
        _entry("--version", "print the version and stop", width),
    ]
    parts[2:] = ["\n".join(parts[2:])]
    for name, group in groups.items():
        doc = " ".join((group.__doc__ or "").split("\n\n")[0].split())
        heading = textwrap.fill(f"[{name}] {doc}" if name else "Options", width)
        rows = [_entry(_spelling(f), _meaning(f), width) for f in flags if f.group == name]
        parts.append("\n".join([heading, *rows]))
    return "\n\n".join(parts) + "\n"


def _entry(spelling: str, meaning: str, width: int) -> str:
    """An option's lines: its spelling, and its meaning beside it or below."""
    lines = textwrap.wrap(meaning, max(20, width - INDENT)) or [""]
    left = f"  {spelling}"
    if len(left) + 2 > INDENT:
        lines.insert(0, left)
    else:
        lines[0] = left.ljust(INDENT) + lines[0]
    return "\n".join([lines[0], *(" " * INDENT + line for line in lines[1:])])


def _spelling(flag: Flag) -> str:
    if flag.is_switch:
        return f"--{flag.name}"
    value = _value(flag)
    return f"--{flag.name} [{value}]" if flag.may_be_bare else f"--{flag.name} {value}"


def _value(flag: Flag) -> str:
    """How the page names a flag's value."""
    types = {int: "N", float: "X", str: "TEXT"}
    named = [types[member] for member in flag.members if member in types]
    value = flag.metavar or "|".join([*named, *(flag.choices if not _is_long(flag) else ["NAME"])])
    return f"{value} [{value} ...]" if flag.takes_many else value or "VALUE"


def _meaning(flag: Flag) -> str:
    choices = f"; one of {', '.join(flag.choices)}" if _is_long(flag) and not flag.metavar else ""
    return flag.help + choices + _default(flag)


def _is_long(flag: Flag) -> bool:
    return len("|".join(flag.choices)) > LONGEST_LIST_OF_CHOICES


def _default(flag: Flag) -> str:
    """The default in brackets, where there is one and the help does not say it already."""
    if flag.required:
        return " (required)"
    if flag.default in (None, {}) or flag.default is False or "(default" in flag.help:
        return ""
    return f" (default: {_as_word(flag.default)})"


def _as_word(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_as_word(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)
