"""The page that `--help` prints: every option by group, with its value, its meaning and its default."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import Any

from llm.config.flags import Flag, flags_of, groups_of
from llm.config.option import OptionGroup

_INDENT = 26
_LONGEST_CHOICES = 40
_MIN_WIDTH = 40


def help_text(table: type[OptionGroup], *, prog: str, description: str) -> str:
    """Return the help page, as wide as the terminal, with a line break at its end.

    Args:
        table: the options of the program.
        prog: how the program is called.
        description: one sentence on what the program does.
    """
    width = max(_MIN_WIDTH, shutil.get_terminal_size().columns - 2)
    flags = list(flags_of(table).values())
    groups = groups_of(table)
    layout = "flat" if "" in groups else "by table"
    general = [
        "General",
        _entry("--config FILE.toml", f"options from a file, {layout}; flags win over it", width),
        _entry("--help, -h", "print this page and exit", width),
        _entry("--version", "print the version and exit", width),
    ]
    sections = [
        f"usage: {prog}{_positional_words(flags)} [--config FILE.toml] [--OPTION VALUE ...]",
        textwrap.fill(description, width),
        "\n".join(general),
    ]
    for name, group in groups.items():
        summary = " ".join((group.__doc__ or "").split("\n\n")[0].split())
        heading = textwrap.fill(f"[{name}] {summary}" if name else "Options", width)
        entries = [_entry(_spelling(flag), _meaning(flag), width) for flag in flags if flag.group == name]
        sections.append("\n".join([heading, *entries]))
    return "\n\n".join(sections) + "\n"


def _positional_words(flags: list[Flag]) -> str:
    """Return the positional options for the usage line, in brackets unless required."""
    words = ""
    for flag in flags:
        if flag.positional:
            words += f" {_value(flag)}" if flag.required else f" [{_value(flag)}]"
    return words


def _entry(spelling: str, meaning: str, width: int) -> str:
    """Return the lines of an option: its spelling, and its meaning beside or below it."""
    lines = textwrap.wrap(meaning, max(20, width - _INDENT)) or [""]
    left = f"  {spelling}"
    if len(left) + 2 > _INDENT:
        lines.insert(0, left)
    else:
        lines[0] = left.ljust(_INDENT) + lines[0]
    return "\n".join([lines[0], *(" " * _INDENT + line for line in lines[1:])])


def _spelling(flag: Flag) -> str:
    if flag.is_switch:
        return f"--{flag.name}"
    value = _value(flag)
    return f"--{flag.name} [{value}]" if flag.may_be_bare else f"--{flag.name} {value}"


def _value(flag: Flag) -> str:
    """Return the name of a flag's value."""
    type_names = {int: "N", float: "X", str: "TEXT"}
    parts = [type_names[member] for member in flag.members if member in type_names]
    parts += ["NAME"] if _has_long_choices(flag) else flag.choices
    value = flag.metavar or "|".join(parts)
    return f"{value} [{value} ...]" if flag.takes_many else value or "VALUE"


def _meaning(flag: Flag) -> str:
    text = flag.help
    if _has_long_choices(flag) and not flag.metavar:
        text += f"; one of {', '.join(flag.choices)}"
    return text + _default(flag)


def _has_long_choices(flag: Flag) -> bool:
    return len("|".join(flag.choices)) > _LONGEST_CHOICES


def _default(flag: Flag) -> str:
    """Return the default in brackets; "" if there is none or the help text names it already."""
    if flag.required:
        return " (required)"
    if flag.default in (None, {}) or flag.default is False or "(default" in flag.help:
        return ""
    return f" (default: {_format_value(flag.default)})"


def _format_value(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_format_value(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)
