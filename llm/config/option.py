"""What one option is: a row with a name, a type, a default, bounds and a line of help.

A table of options is a pydantic model whose fields are groups (one TOML table each) or rows. Rows are
plain pydantic fields; what argparse needs beyond that (a metavar, whether the value is a secret) is kept
in the field's ``json_schema_extra``, so that a row stays one line and nothing about it stands twice.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class OptionGroup(BaseModel):
    """A group of options: one TOML table, one section of ``--help``. Frozen; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    secret: bool = False,
    positional: bool = False,
    replaces: tuple[str, ...] = (),
    **bounds: Any,
) -> Any:
    """One option.

    Args:
        default: the value when neither the command line nor the TOML file gives one.
        help: the line that ``--help`` prints, without the default (which is appended).
        metavar: how ``--help`` names the value; the type's name when None.
        secret: never written to a file, a log or a model card.
        positional: may also be given without its flag, as the first plain word.
        replaces: rows that say the same otherwise: given as a flag, this one puts those of a file aside.
        bounds: pydantic's own (``ge``, ``gt``, ``le``, ``lt``, ``min_length``).
    """
    extra: dict[str, Any] = {
        "metavar": metavar,
        "secret": secret,
        "positional": positional,
        "replaces": replaces,
    }
    return Field(default, description=help, json_schema_extra=extra, **bounds)
