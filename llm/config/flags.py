"""The options of a table as flags, each with the values that it takes.

A table is a pydantic model made of groups (`Options`: one TOML table a group) or one single group
whose options are the top-level keys of the TOML file (the smaller commands).
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from llm.config.abbreviations import BUILT_IN
from llm.config.option import OptionGroup

TRUE_WORDS = ("true", "yes", "on", "t", "y", "1")
FALSE_WORDS = ("false", "no", "off", "f", "n", "0")


@dataclass(frozen=True)
class Flag:
    """One option of a table, as a flag of the command line.

    Attributes:
        name: the option's name, with underscores.
        group: the group that holds the option, or "" where the table is one single group.
        container: `tuple` or `dict` where the value is one, else None.
        members: the types and literals that a value may have, without None: `(int, "epoch")` for
            `int | Literal["epoch"] | None`. For a tuple they are those of its items.
        bounds: the limits of a number, such as `{"ge": 1}`.
        default: the value when the option is not given; None where it is required.
        help: the line of `--help`.
        metavar: the name of the value in `--help`; None where it is derived from the type.
        secret: whether the value is kept out of files and logs.
        positional: whether the value may be given as a plain word.
        replaces: the options whose values from a TOML file are dropped when this one is given as a flag.
        required: whether the option has no default.
    """

    name: str
    group: str
    container: type[tuple[Any, ...]] | type[dict[str, Any]] | None
    members: tuple[Any, ...]
    bounds: Mapping[str, Any]
    default: Any
    help: str
    metavar: str | None
    secret: bool
    positional: bool
    replaces: tuple[str, ...]
    required: bool

    @property
    def takes_many(self) -> bool:
        """Whether the flag takes all words up to the next flag."""
        return self.container is tuple

    @property
    def may_be_bare(self) -> bool:
        """Whether the flag may have no value, which means True."""
        return bool in self.members and self.container is None

    @property
    def is_switch(self) -> bool:
        """Whether the only values are true and false."""
        return self.members == (bool,) and self.container is None

    @property
    def choices(self) -> tuple[str, ...]:
        """The literal words that are allowed as values; empty if there are none."""
        return tuple(member for member in self.members if isinstance(member, str))

    @property
    def key(self) -> str:
        """The option's key in a TOML file, such as `training.seed`."""
        return f"{self.group}.{self.name}" if self.group else self.name

    @property
    def allowed(self) -> str:
        """The values that are allowed, worded to follow "must be"."""
        if self.container is dict:
            return "a table (on the command line a JSON object)"
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        parts = [names[member] + _format_bounds(self.bounds) for member in self.members if member in names]
        if len(self.choices) == 1:
            parts.append(self.choices[0])
        elif self.choices:
            parts.append(f"one of {', '.join(self.choices)}")
        text = ", or ".join(parts)
        return f"{text} (one or several)" if self.takes_many else text

    def parse_words(self, words: list[str]) -> Any:
        """Return the value that the words of a command line stand for.

        Args:
            words: the words after the flag; empty where it has none.

        Raises:
            ValueError: the words do not stand for a value of this type (bounds are not checked).
        """
        if not words:
            if self.may_be_bare:
                return True
            raise ValueError
        if self.takes_many:
            return tuple(self._parse_word(word) for word in words)
        return self._parse_word(words[0])

    def _parse_word(self, word: str) -> Any:
        if any("\ud800" <= char <= "\udfff" for char in word):
            raise ValueError("it is not UTF-8")
        if self.container is dict:
            value = json.loads(word)
            if isinstance(value, dict):
                return value
        if word in self.choices:
            return word
        if bool in self.members:
            # Where any text is allowed, "no" may be the name of a file.
            spellings = ("true", "false") if str in self.members else TRUE_WORDS + FALSE_WORDS
            if word.lower() in spellings:
                return word.lower() in TRUE_WORDS
        for kind in (int, float):
            if kind in self.members:
                with suppress(ValueError):
                    return kind(word)
        if str in self.members and self.container is not dict:
            return word
        raise ValueError

    def convert_toml(self, value: Any) -> Any:
        """Return a TOML value in the type of the option: arrays become tuples, and so does a single text.

        A table may also be given as a text of JSON, because TOML has no null.
        """
        if self.takes_many:
            return tuple(value) if isinstance(value, list) else (value,)
        if self.container is dict and isinstance(value, str):
            try:
                return json.loads(value)
            except ValueError:
                return value
        return value

    def convert_python(self, value: Any) -> Any:
        """Return a value of Python code in the type of the option: as in TOML; also tuples, paths and None."""
        if value is None:
            return None
        if isinstance(value, list | tuple):
            return self.convert_toml([_path_to_text(item) for item in value])
        return self.convert_toml(_path_to_text(value))


def flags_of(table: type[OptionGroup]) -> dict[str, Flag]:
    """Return every option of a table by name, in the order of the table.

    Raises:
        TypeError: a name is used twice, which a flat command line cannot tell apart, or is a built-in one.
    """
    flags: dict[str, Flag] = {}
    for field_name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, OptionGroup):
            fields = {name: (field_name, inner) for name, inner in field.annotation.model_fields.items()}
        else:
            fields = {field_name: ("", field)}
        for name, (group, option_field) in fields.items():
            if name in flags or name in BUILT_IN:
                raise TypeError(f"{table.__name__} uses the name {name} twice, or a built-in one")
            flags[name] = _flag(name, group, option_field)
    return flags


def groups_of(table: type[OptionGroup]) -> dict[str, type[OptionGroup]]:
    """Return the groups of a table by the name of their field; {"": table} where the table is a single group."""
    groups = {
        name: field.annotation
        for name, field in table.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, OptionGroup)
    }
    return groups or {"": table}


def _path_to_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _flag(name: str, group: str, field: FieldInfo) -> Flag:
    container, members = _members(field.annotation)
    schema_extra = field.json_schema_extra
    extra: dict[str, Any] = schema_extra if isinstance(schema_extra, dict) else {}
    return Flag(
        name=name,
        group=group,
        container=container,
        members=members,
        bounds=_bounds(field),
        default=None if field.is_required() else field.default,
        help=field.description or "",
        metavar=extra.get("metavar"),
        secret=bool(extra.get("secret")),
        positional=bool(extra.get("positional")),
        replaces=tuple(extra.get("replaces", ())),
        required=field.is_required(),
    )


def _members(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the container of an annotation (tuple, dict or None) and its flattened members."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        parts = [_members(part) for part in get_args(annotation) if part is not type(None)]
        containers = [container for container, _ in parts if container is not None]
        members = tuple(member for _, inner in parts for member in inner)
        return (containers[0] if containers else None), members
    if origin is Literal:
        return None, get_args(annotation)
    if origin is tuple:
        return tuple, _members(get_args(annotation)[0])[1]
    if origin is dict:
        return dict, ()
    return None, (annotation,)


def _bounds(field: FieldInfo) -> dict[str, Any]:
    return {
        bound: getattr(constraint, bound)
        for constraint in field.metadata
        for bound in ("ge", "gt", "le", "lt")
        if getattr(constraint, bound, None) is not None
    }


def _format_bounds(bounds: Mapping[str, Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    words = [f"{signs[bound]} {limit}" for bound, limit in bounds.items()]
    return " " + " and ".join(words) if words else ""
