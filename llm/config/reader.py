"""Reading of a command line, or keyword arguments, and a TOML file into options; all mistakes are reported at once.

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

from llm.config import VERSION
from llm.config.abbreviations import BUILT_IN, closest_match
from llm.config.argv import ParsedFlag, parse_argv
from llm.config.errors import UsageError
from llm.config.flags import Flag, flags_of, groups_of
from llm.config.option import OptionGroup
from llm.config.toml import toml_value

T = TypeVar("T", bound=OptionGroup)

_LONGEST_SHOWN = 60


@dataclass
class _Layer:
    """The values from one source by option name, and how a mistake quotes each of them."""

    values: dict[str, Any] = field(default_factory=dict)
    quotes: dict[str, str] = field(default_factory=dict)


@dataclass
class _Mistakes:
    """The mistakes so far, one line each, and the options whose values are unknown because of them."""

    lines: list[str] = field(default_factory=list)
    uncertain: set[str] = field(default_factory=set)

    def add(self, line: str, *options: str | None) -> None:
        self.lines.append(" ".join(line.split()))
        self.uncertain.update(option for option in options if option)


def read_options(table: type[T], argv: Sequence[str], *, prog: str, description: str) -> T:
    """Return the options of a command line and its `--config` file.

    `--help` and `--version` write to the standard output and exit.

    Args:
        table: a pydantic class of option groups, or one group.
        argv: the words after the name of the program.
        prog: how the program is called, for `--help`.
        description: one sentence on what the program does, for `--help`.

    Returns:
        A frozen instance of the table. `model_fields_set` of a group holds the options that were given.

    Raises:
        SystemExit: with code 0, after `--help` or `--version`.
        UsageError: something is wrong; the message holds every mistake, one a line.
    """
    flags = flags_of(table)
    parsed_flags = parse_argv(argv, flags)
    _print_help_or_version(table, parsed_flags, prog=prog, description=description)
    mistakes = _Mistakes()
    files = [parsed.values[0] for parsed in parsed_flags if parsed.names == ("config",) and parsed.values]
    file_layer = _read_file(table, flags, files[-1] if files else None, mistakes)
    return _merge(table, flags, file_layer, _read_flags(flags, parsed_flags, mistakes), mistakes)


def read_keywords(table: type[T], values: Mapping[str, object], *, config: str | None = None) -> T:
    """Return the options of keyword arguments and a TOML file; keywords override the file.

    Args:
        table: a pydantic class of option groups, or one group.
        values: Python values by the name of the option; names are complete. Paths, lists and tuples are accepted.
        config: name of the TOML file; None for none.

    Raises:
        UsageError: something is wrong; the message holds every mistake, one a line.
    """
    flags = flags_of(table)
    mistakes = _Mistakes()
    file_layer = _read_file(table, flags, config, mistakes)
    return _merge(table, flags, file_layer, _read_values(flags, values, mistakes), mistakes)


def version_line() -> str:
    """Return a line such as `llm-trainers 0.1.0`: the installed version, or else that of the source files."""
    from importlib import metadata

    try:
        return f"llm-trainers {metadata.version('llm-trainers')}"
    except metadata.PackageNotFoundError:
        return f"llm-trainers {VERSION}"


def _print_help_or_version(
    table: type[OptionGroup], parsed_flags: Sequence[ParsedFlag], *, prog: str, description: str
) -> None:
    """Print the help page or the version and exit, if the command line has such a flag."""
    names = {parsed.names[0] for parsed in parsed_flags if len(parsed.names) == 1}
    if "help" in names:
        from llm.config.help import help_text

        sys.stdout.write(help_text(table, prog=prog, description=description))
    elif "version" in names:
        sys.stdout.write(f"{version_line()}\n")
    else:
        return
    raise SystemExit(0)


# The command line


def _read_flags(flags: Mapping[str, Flag], parsed_flags: Sequence[ParsedFlag], mistakes: _Mistakes) -> _Layer:
    layer = _Layer()
    plain_words: list[str] = []
    for parsed in parsed_flags:
        if parsed.is_plain:
            plain_words += parsed.values
        elif len(parsed.names) != 1:
            _add_unclear_flag(parsed, flags, mistakes)
        elif parsed.names[0] in flags:
            _read_words(flags[parsed.names[0]], parsed.word, parsed.values, layer, mistakes)
        elif not parsed.values:  # --config; _read_file reads it where it has a value
            mistakes.add(f"{parsed.word}: needs a value: the name of a TOML file")
    _read_plain_words(flags, plain_words, layer, mistakes)
    return layer


def _add_unclear_flag(parsed: ParsedFlag, flags: Mapping[str, Flag], mistakes: _Mistakes) -> None:
    """Add a mistake for a flag that is ambiguous or unknown."""
    if parsed.names:
        candidates = ", ".join(f"--{name}" for name in parsed.names)
        mistakes.add(f"{parsed.word}: may mean {candidates}; write it out", *parsed.names)
        return
    guess = closest_match(parsed.word.lstrip("-"), (*flags, *BUILT_IN))
    hint = f"did you mean --{guess}?" if guess else "see --help for all options"
    mistakes.add(f"{parsed.word}: unknown option; {hint}", guess)


def _read_words(flag: Flag, word: str, values: Sequence[str], layer: _Layer, mistakes: _Mistakes) -> None:
    """Read the words of one flag into the layer, or add a mistake."""
    shown = "***" if flag.secret else " ".join(_quote_word(value) for value in values)
    quote = f"{word} {shown}".strip()
    if word and word.lstrip("-").replace("-", "_") != flag.name:
        quote += f" (short for --{flag.name})"
    try:
        layer.values[flag.name] = flag.parse_words(list(values))
        layer.quotes[flag.name] = quote
    except ValueError as error:
        layer.values.pop(flag.name, None)
        line = _wrong_value(quote, flag, values[0]) if values else f"{quote}: needs a value: {flag.allowed}"
        mistakes.add(f"{line} ({error})" if str(error) else line, flag.name)


def _read_plain_words(flags: Mapping[str, Flag], words: list[str], layer: _Layer, mistakes: _Mistakes) -> None:
    """Read words without a flag into the positional options, in the order of the table."""
    rest = list(words)
    for flag in flags.values():
        if rest and flag.positional and flag.name not in layer.values:
            num_words = len(rest) if flag.takes_many else 1
            _read_words(flag, "", rest[:num_words], layer, mistakes)
            del rest[:num_words]
    for word in rest:
        guess = closest_match(word, flags, cutoff=0.8)
        hint = f"did you mean --{guess}?" if guess else "options start with --"
        mistakes.add(f"{_quote_word(word)}: unexpected word; {hint}", guess)


# Keyword arguments


def _read_values(flags: Mapping[str, Flag], values: Mapping[str, object], mistakes: _Mistakes) -> _Layer:
    layer = _Layer()
    for name, value in values.items():
        if name in flags:
            layer.values[name] = flags[name].convert_python(value)
            layer.quotes[name] = f"{name}={'***' if flags[name].secret else _shorten(repr(value))}"
        else:
            guess = closest_match(name, flags)
            hint = f"did you mean {guess}?" if guess else "the names are those of the command line; see its --help"
            mistakes.add(f"{name}: unknown option; {hint}", guess)
    return layer


# The TOML file


def _read_file(table: type[OptionGroup], flags: Mapping[str, Flag], file: str | None, mistakes: _Mistakes) -> _Layer:
    layer = _Layer()
    if file is None:
        return layer
    groups = groups_of(table)
    for key, value in _load_toml(file, mistakes).items():
        if "" in groups:
            _read_key(file, "", key, value, flags, layer, mistakes)
        elif key not in groups:
            mistakes.add(f"{file}: {_unknown_table(key, value, groups, flags)}", key)
        elif not isinstance(value, dict):
            mistakes.add(f"{file}: {key} = {_quote_toml(value)}: must be a table, [{key}]")
        else:
            for name, item in value.items():
                _read_key(file, key, name, item, flags, layer, mistakes)
    return layer


def _load_toml(file: str, mistakes: _Mistakes) -> dict[str, Any]:
    """Return the content of a TOML file; {}, and add a mistake, if it cannot be read."""
    import tomllib

    try:
        return tomllib.loads(Path(file).read_bytes().decode("utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        mistakes.add(f"{file}: not valid TOML: {error}")
    except UnicodeDecodeError as error:
        mistakes.add(f"{file}: not UTF-8 text (at byte {error.start})")
    except FileNotFoundError:
        hint = "" if file.endswith(".toml") else "; --config names a TOML file (--config_name a model)"
        mistakes.add(f"--config {_quote_word(file)}: no such file{hint}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        mistakes.add(f"--config {_quote_word(file)}: cannot be read: {reason}")
    return {}


def _unknown_table(key: str, value: Any, groups: Mapping[str, Any], flags: Mapping[str, Flag]) -> str:
    """Return the mistake in a top-level key that is not a table of options."""
    if key in flags:
        return f"{key}: belongs in the table [{flags[key].group}]"
    if isinstance(value, dict):
        guess = closest_match(key, groups)
        hint = f"did you mean [{guess}]?" if guess else f"the tables are {', '.join(groups)}"
        return f"[{key}]: unknown table; {hint}"
    guess = closest_match(key, flags)
    hint = f"did you mean {flags[guess].key}?" if guess else f"the tables are {', '.join(groups)}"
    return f"{key}: unknown key; {hint}"


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
        hint = f"did you mean {flags[guess].key}?" if guess else f"the keys are {', '.join(siblings)}"
        mistakes.add(f"{file}: {full_key}: unknown key; {hint}", guess)
    elif flags[key].group != group:
        mistakes.add(f"{file}: {full_key}: belongs in the table [{flags[key].group}]", key)
    else:
        shown = "***" if flags[key].secret else _quote_toml(value)
        layer.values[key] = flags[key].convert_toml(value)
        layer.quotes[key] = f"{file}: {full_key} = {shown}"


# All sources


def _merge(
    table: type[T], flags: Mapping[str, Flag], file_layer: _Layer, given_layer: _Layer, mistakes: _Mistakes
) -> T:
    """Return the options of the file and of the flags or keyword arguments, which take precedence.

    Raises:
        UsageError: something is wrong; the message holds every mistake, one a line.
    """
    for name, value in given_layer.values.items():
        if value is not None:
            for other in set(flags[name].replaces) - set(given_layer.values):
                file_layer.values.pop(other, None)
    merged: dict[str, Any] = {}
    for layer in (file_layer, given_layer):
        _drop_wrong_values(table, flags, layer, mistakes)
        merged |= layer.values
    options = _build(table, flags, merged, mistakes)
    if options is None or mistakes.lines:
        raise UsageError("\n".join(dict.fromkeys(mistakes.lines)))
    return options


def _drop_wrong_values(table: type[OptionGroup], flags: Mapping[str, Flag], layer: _Layer, mistakes: _Mistakes) -> None:
    """Remove the values of a wrong type or out of bounds from a layer, and add a mistake for each."""
    wrong = {name for name, value in layer.values.items() if not _is_finite(value)}
    for group_name, group in groups_of(table).items():
        values = {name: value for name, value in layer.values.items() if flags[name].group == group_name}
        try:
            group.model_validate(values, strict=True)
        except ValidationError as error:
            wrong |= {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]} & set(values)
    for name in sorted(wrong, key=list(layer.values).index):
        value = layer.values.pop(name)
        mistakes.add(_wrong_value(layer.quotes[name], flags[name], value), name)


def _build(table: type[T], flags: Mapping[str, Flag], values: Mapping[str, Any], mistakes: _Mistakes) -> T | None:
    """Return the options; None, and add mistakes, where values contradict each other or one is missing."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        group = flags[name].group
        target = nested.setdefault(group, {}) if group else nested
        target[name] = value
    try:
        return table.model_validate(nested, strict=True)
    except ValidationError as error:
        for detail in error.errors():
            name = str(detail["loc"][-1]) if detail["loc"] else ""
            if detail["type"] == "missing" and name not in mistakes.uncertain:
                mistakes.add(f"--{name}: required: {flags[name].help}")
            elif detail["type"] == "value_error":
                for line in str(detail.get("ctx", {}).get("error", detail["msg"])).splitlines():
                    # A contradiction with an option whose value is unknown would be a guess.
                    if mistakes.uncertain.isdisjoint(re.findall(r"\w+", line)):
                        mistakes.add(line)
    return None


def _wrong_value(quote: str, flag: Flag, value: Any) -> str:
    guess = closest_match(value, flag.choices) if isinstance(value, str) else None
    line = f"{quote}: must be {flag.allowed}"
    return f"{line}; did you mean {guess}?" if guess else line


def _is_finite(value: Any) -> bool:
    """Whether a value is not nan or inf, which no option allows."""
    return not isinstance(value, float) or math.isfinite(value)


def _quote_toml(value: Any) -> str:
    return _shorten(toml_value(value))


def _quote_word(word: str) -> str:
    return _shorten(word if word and word.isprintable() and " " not in word else repr(word))


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
