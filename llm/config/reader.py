"""From a command line and a TOML file to options, or to every mistake in them at once.

Precedence is default < `--config FILE.toml` < flag; of a repeated flag the last one counts.
This is not argparse because argparse stops at the first mistake.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from llm.config.abbreviations import BUILT_IN, closest_match
from llm.config.argv import ParsedFlag, parse_argv
from llm.config.errors import UsageError
from llm.config.flags import Flag, flags_of, groups_of
from llm.config.option import OptionGroup
from llm.config.toml import toml_value

T = TypeVar("T", bound=OptionGroup)


@dataclass
class _Layer:
    """What one source gave: values by the row's name, and how a mistake names each of them."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)


@dataclass
class _Mistakes:
    """The lines so far, and the rows that no conclusion may be drawn from any more."""

    lines: list[str] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)

    def add(self, line: str, *rows: str | None) -> None:
        self.lines.append(" ".join(line.split()))
        self.doubtful.update(row for row in rows if row)


def read_options(table: type[T], argv: Sequence[str], *, prog: str, description: str) -> T:
    """The options that a command line asks for.

    `--help` and `--version` write to the standard output and leave.

    Args:
        table: a model made of groups, or a single group.
        argv: the words after the program's name.
        prog: how the program is called, for `--help`.
        description: what the program does, in a sentence, for `--help`.

    Returns:
        A frozen instance of the table; `model_fields_set` of a group names the given rows.

    Raises:
        SystemExit: 0, after `--help` or `--version`.
        UsageError: if anything is wrong; the message holds every mistake, one a line.
    """
    flags = flags_of(table)
    given = parse_argv(argv, flags)
    _answer_questions(table, given, prog=prog, description=description)
    mistakes = _Mistakes()
    layers = [
        _read_file(table, flags, given, mistakes),
        _read_flags(flags, given, mistakes),
    ]
    file_layer, flag_layer = layers
    for name in flag_layer.values:
        for other in set(flags[name].replaces) - set(flag_layer.values):
            file_layer.values.pop(other, None)
    merged: dict[str, Any] = {}
    for layer in layers:
        _drop_wrong_values(table, flags, layer, mistakes)
        merged |= layer.values
    options = _build(table, flags, merged, mistakes)
    if options is None or mistakes.lines:
        raise UsageError("\n".join(dict.fromkeys(mistakes.lines)))
    return options


def version_line() -> str:
    """Such as `llm-trainers 0.1.0`: of the installed package, else of these files."""
    from importlib import metadata

    import llm

    try:
        return f"llm-trainers {metadata.version('llm-trainers')}"
    except metadata.PackageNotFoundError:
        return f"llm-trainers {llm.__version__}"


def _answer_questions(table: type[OptionGroup], given: Sequence[ParsedFlag], *, prog: str, description: str) -> None:
    asked = {name for each in given if len(each.names) == 1 for name in each.names}
    if "help" in asked:
        from llm.config.help import help_text

        sys.stdout.write(help_text(table, prog=prog, description=description))
    elif "version" in asked:
        sys.stdout.write(f"{version_line()}\n")
    else:
        return
    raise SystemExit(0)


# The command line


def _read_flags(flags: Mapping[str, Flag], given: Sequence[ParsedFlag], mistakes: _Mistakes) -> _Layer:
    layer = _Layer()
    plain: list[str] = []
    for each in given:
        if each.is_plain:
            plain += each.values
        elif len(each.names) != 1:
            _add_unclear_flag(each, flags, mistakes)
        elif each.names[0] in flags:
            _read_words(flags[each.names[0]], each.word, each.values, layer, mistakes)
        elif not each.values:  # of --config, which _read_file looks at otherwise
            mistakes.add(f"{each.word}: needs a value: the name of a TOML file")
    _read_plain_words(flags, plain, layer, mistakes)
    return layer


def _add_unclear_flag(given: ParsedFlag, flags: Mapping[str, Flag], mistakes: _Mistakes) -> None:
    if given.names:
        candidates = ", ".join(f"--{name}" for name in given.names)
        mistakes.add(f"{given.word}: may mean {candidates}; write it out", *given.names)
        return
    guess = closest_match(given.word.lstrip("-"), (*flags, *BUILT_IN))
    mend = f"did you mean --{guess}?" if guess else "see --help for all options"
    mistakes.add(f"{given.word}: unknown option; {mend}", guess)


def _read_words(flag: Flag, word: str, values: Sequence[str], layer: _Layer, mistakes: _Mistakes) -> None:
    """Read one flag's words into the layer, or add a mistake."""
    shown = " ".join(_shown(value) for value in values) if not flag.secret else "***"
    place = f"{word} {shown}".strip()
    if word and word.lstrip("-").replace("-", "_") != flag.name:
        place += f" (short for --{flag.name})"
    try:
        layer.values[flag.name] = flag.read(list(values))
        layer.places[flag.name] = place
    except ValueError as error:
        layer.values.pop(flag.name, None)
        bare = f"{place}: needs a value: {flag.allowed}"
        line = _wrong_value(place, flag, values[0]) if values else bare
        mistakes.add(f"{line} ({error})" if str(error) else line, flag.name)


def _read_plain_words(flags: Mapping[str, Flag], plain: list[str], layer: _Layer, mistakes: _Mistakes) -> None:
    """Words without a flag go to the positional rows, in the table's order."""
    for flag in flags.values():
        if plain and flag.positional and flag.name not in layer.values:
            count = len(plain) if flag.takes_many else 1
            _read_words(flag, "", plain[:count], layer, mistakes)
            del plain[:count]
    for word in plain:
        guess = closest_match(word, flags, cutoff=0.8)
        mend = f"did you mean --{guess}?" if guess else "options start with --"
        mistakes.add(f"{_shown(word)}: unexpected word; {mend}", guess)


# The TOML file


def _read_file(
    table: type[OptionGroup], flags: Mapping[str, Flag], given: Sequence[ParsedFlag], mistakes: _Mistakes
) -> _Layer:
    layer = _Layer()
    names = [each.values[0] for each in given if each.names == ("config",) and each.values]
    if not names:
        return layer
    content = _load(names[-1], mistakes)
    groups = groups_of(table)
    for key, value in content.items():
        if "" in groups:
            _read_key(names[-1], "", key, value, flags, layer, mistakes)
        elif key not in groups:
            mistakes.add(f"{names[-1]}: {_unknown_table(key, value, groups, flags)}", key)
        elif not isinstance(value, dict):
            mistakes.add(f"{names[-1]}: {key} = {_shown_toml(value)}: must be a table, [{key}]")
        else:
            for row, item in value.items():
                _read_key(names[-1], key, row, item, flags, layer, mistakes)
    return layer


def _load(name: str, mistakes: _Mistakes) -> dict[str, Any]:
    """The content of a TOML file; nothing, and a mistake, if it cannot be read."""
    import tomllib

    try:
        return tomllib.loads(Path(name).read_bytes().decode("utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        mistakes.add(f"{name}: not valid TOML: {error}")
    except UnicodeDecodeError as error:
        mistakes.add(f"{name}: not UTF-8 text (at byte {error.start})")
    except FileNotFoundError:
        mend = "" if name.endswith(".toml") else "; --config names a TOML file (--config_name a model)"
        mistakes.add(f"--config {_shown(name)}: no such file{mend}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        mistakes.add(f"--config {_shown(name)}: cannot be read: {reason}")
    return {}


def _unknown_table(key: str, value: Any, groups: Mapping[str, Any], flags: Mapping[str, Flag]) -> str:
    if key in flags:
        return f"{key}: belongs in the table [{flags[key].group}]"
    if isinstance(value, dict):
        guess = closest_match(key, groups)
        mend = f"did you mean [{guess}]?" if guess else f"the tables are {', '.join(groups)}"
        return f"[{key}]: unknown table; {mend}"
    guess = closest_match(key, flags)
    mend = f"; did you mean {flags[guess].key}?" if guess else f"; the tables are {', '.join(groups)}"
    return f"{key}: unknown key{mend}"


def _read_key(
    file: str,
    group: str,
    key: str,
    value: Any,
    flags: Mapping[str, Flag],
    layer: _Layer,
    mistakes: _Mistakes,
) -> None:
    """Read one key of a table into the layer, or add a mistake."""
    full_key = f"{group}.{key}" if group else key
    if key not in flags:
        siblings = [flag.name for flag in flags.values() if flag.group == group]
        guess = closest_match(key, siblings) or closest_match(key, flags)
        mend = f"did you mean {flags[guess].key}?" if guess else f"known are {', '.join(siblings)}"
        mistakes.add(f"{file}: {full_key}: unknown key; {mend}", guess)
    elif flags[key].group != group:
        mistakes.add(f"{file}: {full_key}: belongs in the table [{flags[key].group}]", key)
    else:
        shown = "***" if flags[key].secret else _shown_toml(value)
        layer.values[key] = flags[key].accept(value)
        layer.places[key] = f"{file}: {full_key} = {shown}"


# Both


def _drop_wrong_values(table: type[OptionGroup], flags: Mapping[str, Flag], layer: _Layer, mistakes: _Mistakes) -> None:
    """Take the values of a wrong type or out of bounds out of a layer, each with a mistake."""
    wrong = {name for name, value in layer.values.items() if not _is_finite(value)}
    for group_name, group in groups_of(table).items():
        rows = {name: v for name, v in layer.values.items() if flags[name].group == group_name}
        try:
            group.model_validate(rows, strict=True)
        except ValidationError as error:
            wrong |= {str(each["loc"][0]) for each in error.errors() if each["loc"]} & set(rows)
    for name in sorted(wrong, key=list(layer.values).index):
        value = layer.values.pop(name)
        mistakes.add(_wrong_value(layer.places[name], flags[name], value), name)


def _build(table: type[T], flags: Mapping[str, Flag], values: Mapping[str, Any], mistakes: _Mistakes) -> T | None:
    """The options; None, and mistakes, where values contradict each other or one is missing."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        (nested.setdefault(flags[name].group, {}) if flags[name].group else nested)[name] = value
    try:
        return table.model_validate(nested, strict=True)
    except ValidationError as error:
        for each in error.errors():
            row = str(each["loc"][-1]) if each["loc"] else ""
            if each["type"] == "missing" and row not in mistakes.doubtful:
                mistakes.add(f"--{row}: required: {flags[row].help}")
            elif each["type"] == "value_error":
                lines = str(each.get("ctx", {}).get("error", each["msg"])).splitlines()
                for line in lines:
                    # A line about a row whose value is unknown would be a guess.
                    if mistakes.doubtful.isdisjoint(re.findall(r"\w+", line)):
                        mistakes.add(line)
    return None


def _wrong_value(place: str, flag: Flag, value: Any) -> str:
    guess = closest_match(value, flag.choices) if isinstance(value, str) else None
    return f"{place}: must be {flag.allowed}" + (f"; did you mean {guess}?" if guess else "")


def _is_finite(value: Any) -> bool:
    """Whether a number is one: no option takes nan or inf."""
    return not isinstance(value, float) or math.isfinite(value)


def _shown_toml(value: Any) -> str:
    return _shortened(toml_value(value))


def _shown(word: str) -> str:
    return _shortened(word if word and word.isprintable() and " " not in word else repr(word))


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
