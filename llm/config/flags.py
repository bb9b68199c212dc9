"""A table of options seen from outside: each row as a flag, with the values that it takes.

A table is a pydantic model made of groups (`Options`: one TOML table a group) or one single group
whose rows stand at the top of the TOML file (the smaller commands).
"""

from __future__ import annotations

import json
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
    """One row of a table.

    Attributes:
        name: the row's name, with underscores.
        group: the field of the table that holds it, or "" where the table is one single group.
        members: the types that a value may have, None left out: of `int | Literal["epoch"] | None`
            they are `(int, "epoch")`; of a tuple or a dict they are its own.
        bounds: such as `{"ge": 1}`.
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
        """Whether the flag takes all the words up to the next flag."""
        return self.container is tuple

    @property
    def may_be_bare(self) -> bool:
        """Whether the flag may stand without a value, which means True."""
        return bool in self.members and self.container is None

    @property
    def is_switch(self) -> bool:
        """Whether true and false are its only values."""
        return self.members == (bool,) and self.container is None

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that are allowed by name; empty when any are."""
        return tuple(member for member in self.members if isinstance(member, str))

    @property
    def key(self) -> str:
        """The row's place in a TOML file, such as `training.seed`."""
        return f"{self.group}.{self.name}" if self.group else self.name

    @property
    def allowed(self) -> str:
        """The values it takes, to be read after "must be"."""
        if self.container is dict:
            return "a table (on the command line a JSON object)"
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        parts = [names[member] + _in_words(self.bounds) for member in self.members if member in names]
        if self.choices:
            parts.append("one of " * (len(self.choices) > 1) + ", ".join(self.choices))
        return ", or ".join(parts) + (" (one or several)" if self.takes_many else "")

    def read(self, words: list[str]) -> Any:
        """The value that words on the command line stand for.

        Args:
            words: what followed the flag; empty where it stands bare.

        Raises:
            ValueError: if the words do not stand for a value of this type (bounds are not checked).
        """
        if not words:
            if self.may_be_bare:
                return True
            raise ValueError
        if self.takes_many:
            return tuple(self._read_word(word) for word in words)
        return self._read_word(words[0])

    def _read_word(self, word: str) -> Any:
        if any("\ud800" <= char <= "\udfff" for char in word):
            raise ValueError("it is not UTF-8")
        if self.container is dict:
            value = json.loads(word)
            if isinstance(value, dict):
                return value
        if word in self.choices:
            return word
        if bool in self.members:
            # Where any text is a value, a file may be called "no".
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

    def accept(self, value: Any) -> Any:
        """A TOML value in the form that the table wants: arrays are tuples, a lone text is one.

        A table may also come as a text of JSON, since TOML has no null.
        """
        if self.takes_many:
            return tuple(value) if isinstance(value, list) else (value,)
        if self.container is dict and isinstance(value, str):
            try:
                return json.loads(value)
            except ValueError:
                return value
        return value


def flags_of(table: type[OptionGroup]) -> dict[str, Flag]:
    """Every row of a table by name, in the order in which the table lists them.

    Raises:
        TypeError: if a name is used twice, since the command line is flat.
    """
    flags: dict[str, Flag] = {}
    for field_name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, OptionGroup):
            rows = {name: (field_name, row) for name, row in field.annotation.model_fields.items()}
        else:
            rows = {field_name: ("", field)}
        for name, (group, row) in rows.items():
            if name in flags or name in BUILT_IN:
                raise TypeError(f"{table.__name__} uses the name {name} twice, or a built-in one")
            flags[name] = _flag(name, group, row)
    return flags


def groups_of(table: type[OptionGroup]) -> dict[str, type[OptionGroup]]:
    """The groups of a table by their field's name; {"": table} where the table is one itself."""
    groups = {
        name: field.annotation
        for name, field in table.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, OptionGroup)
    }
    return groups or {"": table}


def _flag(name: str, group: str, row: FieldInfo) -> Flag:
    container, members = _members(row.annotation)
    extra = row.json_schema_extra
    traits: dict[str, Any] = extra if isinstance(extra, dict) else {}
    return Flag(
        name=name,
        group=group,
        container=container,
        members=members,
        bounds=_bounds(row),
        default=None if row.is_required() else row.default,
        help=row.description or "",
        metavar=traits.get("metavar"),
        secret=bool(traits.get("secret")),
        positional=bool(traits.get("positional")),
        replaces=tuple(traits.get("replaces", ())),
        required=row.is_required(),
    )


def _members(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """The container (tuple, dict or None) and the flattened members of an annotation."""
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


def _bounds(row: FieldInfo) -> dict[str, Any]:
    return {
        bound: getattr(constraint, bound)
        for constraint in row.metadata
        for bound in ("ge", "gt", "le", "lt")
        if getattr(constraint, bound, None) is not None
    }


def _in_words(bounds: Mapping[str, Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    words = [f"{signs[bound]} {limit}" for bound, limit in bounds.items()]
    return " " + " and ".join(words) if words else ""
