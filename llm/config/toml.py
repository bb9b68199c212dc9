"""Options as text: TOML that `--config` reads back, and a command line without secrets."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from llm.config.argv import parse_argv
from llm.config.flags import flags_of
from llm.config.option import OptionGroup
from llm.config.options import Options

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(options: OptionGroup) -> str:
    """Return options as TOML: one table a group, every option that has a value, no secrets.

    `read_options` with this text as `--config` returns options that equal `options`, except for secrets.
    """
    tables: dict[str, list[str]] = {}
    for flag in flags_of(type(options)).values():
        group = getattr(options, flag.group) if flag.group else options
        value = getattr(group, flag.name)
        if value is not None and not flag.secret:
            header = [f"[{flag.group}]"] if flag.group else []
            tables.setdefault(flag.group, header).append(f"{flag.name} = {toml_value(value)}")
    return "\n".join("".join(f"{line}\n" for line in lines) for lines in tables.values())


def toml_value(value: Any) -> str:
    """Return a value as TOML, on one line.

    TOML has no null: a dict that holds None is written as a text of JSON, which the reader converts
    back to a dict.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _toml_text(value)
    if isinstance(value, Mapping):
        if any(item is None for item in value.values()):
            return _toml_text(json.dumps(dict(value)))
        items = [f"{_toml_key(key)} = {toml_value(item)}" for key, item in value.items()]
        return "{ " + ", ".join(items) + " }" if items else "{}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return str(value)


def redacted_command_line(argv: Sequence[str], table: type[OptionGroup] = Options) -> str:
    """Return a command line that a shell can read, with `***` instead of secret values.

    Args:
        argv: the words, as in `sys.argv` (words before the first flag are kept).
        table: the options of the command.
    """
    flags = flags_of(table)
    words: list[str] = []
    for parsed in parse_argv(argv, flags):
        may_be_secret = any(name in flags and flags[name].secret for name in parsed.names)
        # An unknown flag may be the misspelt name of a secret option.
        is_unknown = not parsed.is_plain and not parsed.names
        values = ["***" if may_be_secret or is_unknown else shlex.quote(value) for value in parsed.values]
        if parsed.joined:
            words.append(f"{parsed.word}={values[0]}")
            continue
        if parsed.word:
            words.append(parsed.word)
        words += values
    return " ".join(words)


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _toml_text(key)


def _toml_text(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(char) or _escaped(char) for char in text) + '"'


def _escaped(char: str) -> str:
    """Return a character, with control characters escaped as TOML requires."""
    return f"\\u{ord(char):04X}" if ord(char) < 0x20 or ord(char) == 0x7F else char
