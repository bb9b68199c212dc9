"""Options written down: as TOML that `--config` reads back, and as a command line."""

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

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(options: OptionGroup) -> str:
    """Options as TOML: one table a group, every row that has a value, and no secrets.

    What `read_options` makes of it through `--config` equals `options`, secrets apart.
    """
    tables: dict[str, list[str]] = {}
    for flag in flags_of(type(options)).values():
        group = getattr(options, flag.group) if flag.group else options
        value = getattr(group, flag.name)
        if value is not None and not flag.secret:
            tables.setdefault(flag.group, []).append(f"{flag.name} = {toml_value(value)}")
    return "\n".join(
        "".join(f"{line}\n" for line in ([f"[{name}]"] if name else []) + lines) for name, lines in tables.items()
    )


def toml_value(value: Any) -> str:
    """A value as TOML, on one line.

    TOML has no null: a dict that holds None is written as a text of JSON, which the reader takes
    for a dict as well.
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
    """A command line as a shell would take it, with `***` in the place of secret values.

    Args:
        argv: the words, as in `sys.argv` (the words before the first flag are kept as they are).
        table: the options that the command reads.
    """
    flags = flags_of(table)
    words: list[str] = []
    for given in parse_argv(argv, flags):
        # What follows an unknown flag may be a secret behind a misspelt name.
        is_open = given.is_plain or (
            bool(given.names) and not any(name in flags and flags[name].secret for name in given.names)
        )
        values = [shlex.quote(value) if is_open else "***" for value in given.values]
        if given.joined:
            words.append(f"{given.word}={values[0]}")
        else:
            words += [*([given.word] if given.word else []), *values]
    return " ".join(words)


def _toml_key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else _toml_text(key)


def _toml_text(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(char) or _escaped(char) for char in text) + '"'


def _escaped(char: str) -> str:
    """Control characters may not stand in TOML as they are."""
    return f"\\u{ord(char):04X}" if ord(char) < 0x20 or ord(char) == 0x7F else char
