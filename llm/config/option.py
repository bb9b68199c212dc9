"""Definition of an option: a name, a type, a default, bounds and a line of help.

A table of options is a pydantic model whose fields are groups (one TOML table each) or options. Options are
plain pydantic fields. The additional facts for the command line (a metavar, whether the value is a secret) are
kept in the field's ``json_schema_extra``, so that each option is defined in one place.
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
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Return the pydantic field of one option.

    Args:
        default: the value when neither the command line nor the TOML file gives one; ``...`` when it is required.
        help: the line that ``--help`` prints, without the default (which is appended).
        metavar: the name of the value in ``--help``; derived from the type when None.
        secret: whether the value is kept out of all files, logs and model cards.
        positional: whether the value may also be given without its flag, as a plain word.
        replaces: alternatives to this option: when this option is given as a flag, their values from the TOML file
            are dropped.
        ge: smallest value that is allowed.
        gt: bound above which the value must be.
        le: largest value that is allowed.
        lt: bound below which the value must be.
    """
    extra: dict[str, Any] = {
        "metavar": metavar,
        "secret": secret,
        "positional": positional,
        "replaces": replaces,
    }
    return Field(default, description=help, json_schema_extra=extra, ge=ge, gt=gt, le=le, lt=lt)
