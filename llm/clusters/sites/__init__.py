"""What is special about a computing centre, kept as data: one TOML file each."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from llm.config.abbreviations import closest_match
from llm.config.errors import UserError
from llm.config.option import OptionGroup

Scheduler = Literal["pbs", "slurm"]


class SchedulerLines(OptionGroup):
    """What a job script of the site says to its scheduler.

    Attributes:
        queue: where jobs wait that name none; None for the scheduler's own default.
        queue_flag: how a queue is named.
        directives: further lines; `{nodes}` stands for the number of hosts.
    """

    queue: str | None = None
    queue_flag: str | None = None
    directives: tuple[str, ...] = Field(strict=False)

    @field_validator("directives")
    @classmethod
    def _ask_for_hosts(cls, directives: tuple[str, ...]) -> tuple[str, ...]:
        if not any("{nodes}" in line for line in directives):
            raise ValueError("one must ask for {nodes} hosts")
        return directives


class Site(OptionGroup):
    """One computing centre.

    Attributes:
        modules: shell lines for its module system; left out on a machine that has none.
        environment: variables, set where the modules are.
        container: what stands before python on each host; None for nothing.
        pbs: its lines for PBS; None where it has none.
        slurm: its lines for Slurm; None where it has none.
    """

    modules: tuple[str, ...] = Field((), strict=False)
    environment: dict[str, str] = Field({})
    container: str | None = None
    pbs: SchedulerLines | None = None
    slurm: SchedulerLines | None = None

    def lines(self, scheduler: Scheduler) -> SchedulerLines | None:
        """Its lines for a scheduler."""
        return self.pbs if scheduler == "pbs" else self.slurm


def known_sites() -> tuple[str, ...]:
    """Their names."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def read_site(name: str, scheduler: Scheduler) -> Site:
    """A site by its name, or by the name of a TOML file.

    Raises:
        UserError: there is no such site, it has another scheduler, or the file is wrong.
    """
    if name in known_sites():
        text = (resources.files(__name__) / f"{name}.toml").read_text()
    elif name.endswith(".toml"):
        try:
            text = Path(name).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UserError(f"--site {name}: cannot be read ({reason})") from None
    else:
        guess = closest_match(name, known_sites())
        known = f"did you mean {guess}?" if guess else f"known are {', '.join(known_sites())}, and any TOML file"
        raise UserError(f"--site {name}: unknown; {known}")
    site = _read(name, text)
    if site.lines(scheduler) is None:
        other = "slurm" if scheduler == "pbs" else "pbs"
        raise UserError(f"--site {name} does not run {scheduler}; use `python -m llm.launch {other}`")
    return site


def _read(name: str, text: str) -> Site:
    try:
        content: dict[str, Any] = tomllib.loads(text)
        return Site.model_validate(content)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--site {name}: not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"--site {name}: {place}: {first['msg'].lower()}") from None
