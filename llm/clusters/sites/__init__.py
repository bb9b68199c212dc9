"""Computing centres: one TOML file each holds what is special about its job scripts."""

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
    """Directives of the site's job scripts for one scheduler.

    Attributes:
        queue: the queue if the user names none; None for the scheduler's own default.
        queue_flag: sbatch's option for a queue, if not `--partition`.
        directives: further directives; `{nodes}` stands for the number of hosts.
    """

    queue: str | None = None
    queue_flag: str | None = None
    directives: tuple[str, ...] = Field(strict=False)

    @field_validator("directives")
    @classmethod
    def _require_hosts(cls, directives: tuple[str, ...]) -> tuple[str, ...]:
        if not any("{nodes}" in line for line in directives):
            raise ValueError("one must ask for {nodes} hosts")
        return directives


class Site(OptionGroup):
    """One computing centre.

    Attributes:
        modules: shell lines for its module system; skipped on a machine that has none.
        environment: variables, set where the modules are loaded.
        container: a command that is put before python on each host; None for none.
        pbs: directives for PBS; None if the site has no PBS.
        slurm: directives for Slurm; None if the site has no Slurm.
    """

    modules: tuple[str, ...] = Field((), strict=False)
    environment: dict[str, str] = Field({})
    container: str | None = None
    pbs: SchedulerLines | None = None
    slurm: SchedulerLines | None = None

    def lines_for(self, scheduler: Scheduler) -> SchedulerLines | None:
        """Return the directives for a scheduler; None if the site has another one."""
        return self.pbs if scheduler == "pbs" else self.slurm


def known_sites() -> tuple[str, ...]:
    """Return the names of the sites that this package describes, sorted."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def read_site(name: str, scheduler: Scheduler) -> Site:
    """Read a site by its name, or from a TOML file.

    Raises:
        UserError: the site is unknown, has another scheduler, or its file is wrong.
    """
    if name in known_sites():
        text = (resources.files(__name__) / f"{name}.toml").read_text()
    elif name.endswith(".toml"):
        try:
            text = Path(name).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not a text file"
            raise UserError(f"--site {name}: cannot be read ({reason})") from None
    else:
        guess = closest_match(name, known_sites())
        hint = f"did you mean {guess}?" if guess else f"known are {', '.join(known_sites())}, and any TOML file"
        raise UserError(f"--site {name}: unknown; {hint}")
    site = _parse(name, text)
    if site.lines_for(scheduler) is None:
        other = "slurm" if scheduler == "pbs" else "pbs"
        raise UserError(f"--site {name} does not run {scheduler}; use `python -m llm.launch {other}`")
    return site


def _parse(name: str, text: str) -> Site:
    try:
        content: dict[str, Any] = tomllib.loads(text)
        return Site.model_validate(content)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--site {name}: not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"--site {name}: {key}: {first['msg'].lower()}") from None
