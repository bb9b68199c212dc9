"""Job scripts for PBS and Slurm: their text, and their submission."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm.clusters.sites import Scheduler, Site
from llm.clusters.trainer_command import DEFAULT_MODULE
from llm.config.errors import UserError
from llm.system.units import format_duration

# A word that needs no quotes in the script.
_PLAIN = re.compile(r"[\w./:@%+,=-]+")
_JOB_NAME = re.compile(r"[A-Za-z][\w.-]{0,62}")
_DIRECTIVE_VALUE = re.compile(r"[\w.@:/+-]+")
_PLACEHOLDER = "ALLOCATION"
DEFAULT_SETUP = ('export PATH="$PWD/.venv/bin:$PATH"',)


@dataclass(frozen=True)
class _Dialect:
    """The differences between the scripts of PBS and Slurm.

    Attributes:
        shebang: the first line.
        directive: start of a line that the scheduler reads.
        submit_with: the command that submits the script with variables.
        submit_dir: the variable that holds the folder of submission.
        program: the command that submits the script.
        suffix: of the script's file.
    """

    shebang: str
    directive: str
    submit_with: str
    submit_dir: str
    program: str
    suffix: str


_DIALECTS: dict[Scheduler, _Dialect] = {
    "pbs": _Dialect(
        # PBS starts a job in a fresh environment, in which only a login shell defines the module command.
        shebang="#!/bin/bash -l",
        directive="#PBS",
        submit_with="qsub -v ",
        submit_dir="PBS_O_WORKDIR",
        program="qsub",
        suffix="pbs",
    ),
    "slurm": _Dialect(
        shebang="#!/bin/bash",
        directive="#SBATCH",
        submit_with="sbatch --export=ALL,",
        submit_dir="SLURM_SUBMIT_DIR",
        program="sbatch",
        suffix="sbatch",
    ),
}


@dataclass(frozen=True)
class ScriptSettings:
    """The resources that a job script requests, and the process count and environment of what it starts.

    Attributes:
        name: of the job.
        nodes: number of hosts.
        walltime_seconds: longest time of the job.
        account: the project that pays; None for a placeholder that the user replaces.
        queue: None for the site's.
        chain: number of jobs that the run may take.
        nproc: number of processes on each host; None to count accelerators when the job starts.
        setup: shell lines that put the right python on PATH.
        container: a command that is put before python; None for the site's.
    """

    name: str
    nodes: int
    walltime_seconds: float
    account: str | None = None
    queue: str | None = None
    chain: int = 1
    nproc: int | None = None
    setup: Sequence[str] = DEFAULT_SETUP
    container: str | None = None


def format_job_script(
    scheduler: Scheduler, site: Site, settings: ScriptSettings, module: str, arguments: Sequence[str]
) -> str:
    """Return the text of a job script, which also runs in an interactive allocation or without a scheduler.

    Args:
        scheduler: the scheduler that reads the script.
        site: where the script runs.
        settings: what the job requests and starts.
        module: the trainer.
        arguments: the trainer's options; they reach it unchanged.

    Raises:
        UserError: a setting holds characters that a scheduler would misread.
    """
    _check(settings)
    dialect = _DIALECTS[scheduler]
    fixed, account, hosts = _directives(scheduler, site, settings)
    lines = [
        dialect.shebang,
        f"# `{dialect.submit_with}CONFIG=my.toml,CHAIN=4 FILE` runs my.toml in up to 4 jobs; "
        "`bash FILE` runs without a scheduler.",
        *(f"{dialect.directive} {line}" for line in fixed),
        "# Edit 1 of 3: the project that pays",
        f"{dialect.directive} {account}",
        "# Edit 2 of 3: the number of hosts",
        *(f"{dialect.directive} {line}" for line in hosts),
        "",
        "set -euo pipefail",
        f'cd "${{{dialect.submit_dir}:-$PWD}}"',
        *_site_lines(site),
        "# Edit 3 of 3: the environment that holds this package",
        *settings.setup,
        "",
        "OPTIONS=(",
        *(f"  {line}" for line in _option_lines(arguments)),
        ")",
        "# Runs `llm.launch node` once on each host with mpiexec or srun. Exit codes: 0 done, 75 stopped, 1 failed.",
        _last_line(settings, settings.container or site.container, module),
    ]
    return "\n".join(lines) + "\n"


def submit_job_script(scheduler: Scheduler, name: str, text: str) -> None:
    """Write a job script to `NAME.pbs` or `NAME.sbatch` in the current folder, and submit it.

    Raises:
        UserError: another script has this name, the file cannot be written, or the scheduler refuses the script.
    """
    dialect = _DIALECTS[scheduler]
    path = Path(f"{name}.{dialect.suffix}")
    try:
        if path.exists() and path.read_text() != text:
            raise UserError(f"{path} already exists and holds another script; remove it, or give another --name")
        path.write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written here ({error.strerror}); submit from another folder") from None
    try:
        result = subprocess.run([dialect.program, str(path)], stdin=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        raise UserError(
            f"there is no {dialect.program} here; the script is in {path}, submit it from a host that has one"
        ) from None
    if result.returncode != 0:
        path.unlink()  # it would block a corrected script of the same name
        raise UserError(f"{dialect.program} refused {path} (exit code {result.returncode})")


def _check(settings: ScriptSettings) -> None:
    if not _JOB_NAME.fullmatch(settings.name):
        raise UserError(f"--name {settings.name!r}: must be a letter, then letters, digits, `.`, `_` or `-`")
    for flag, value in (("account", settings.account), ("queue", settings.queue)):
        if value is not None and not _DIRECTIVE_VALUE.fullmatch(value):
            raise UserError(f"--{flag} {value!r}: must be one word, as the scheduler knows it")
    for line in settings.setup:
        if "\n" in line:
            raise UserError("--setup: give each line as a separate word")


def _directives(scheduler: Scheduler, site: Site, settings: ScriptSettings) -> tuple[list[str], str, list[str]]:
    """The fixed directives, the one of the account, and those that hold the number of hosts."""
    lines = site.lines_for(scheduler)
    assert lines is not None
    walltime = format_duration(max(1, round(settings.walltime_seconds)))  # both schedulers read H:MM:SS
    account = settings.account or _PLACEHOLDER
    queue = settings.queue or lines.queue
    if scheduler == "pbs":
        fixed = [f"-N {settings.name}", "-j oe", "-r y", f"-l walltime={walltime}"]
        account_line = f"-A {account}"
        queue_line = f"-q {queue}"
    else:
        fixed = [f"--job-name={settings.name}", "--output=%x.o%j", "--open-mode=append", "--requeue"]
        fixed += [f"--time={walltime}", "--ntasks-per-node=1"]
        account_line = f"--account={account}"
        queue_line = f"{lines.queue_flag or '--partition'}={queue}"
    if queue:
        fixed.append(queue_line)
    fixed += [line for line in lines.directives if "{nodes}" not in line]
    hosts = [line.replace("{nodes}", str(settings.nodes)) for line in lines.directives if "{nodes}" in line]
    return fixed, account_line, hosts


def _site_lines(site: Site) -> list[str]:
    """The lines that load modules and set variables, if the machine has a module system."""
    lines: list[str] = []
    if site.modules:
        # Module systems and conda read variables that may be unset.
        lines.append(f"set +u; {'; '.join(site.modules)}; set -u")
    if site.environment:
        lines.append("export " + " ".join(f"{name}={_quoted(value)}" for name, value in site.environment.items()))
    return ["if command -v module > /dev/null; then", *(f"  {line}" for line in lines), "fi"] if lines else []


def _option_lines(arguments: Sequence[str]) -> list[str]:
    """Each option with its values on a line.

    `CONFIG`, if it is set, replaces the configuration; a job resumes from what an earlier one saved.
    """
    lines: list[str] = []
    for number, word in enumerate(arguments):
        if number and arguments[number - 1] == "--config" and _PLAIN.fullmatch(word):
            lines[-1] += f' "${{CONFIG:-{word}}}"'
        elif word.startswith("--") or not lines:
            lines.append(_quoted(word))
        else:
            lines[-1] += f" {_quoted(word)}"
    names = {word.partition("=")[0].replace("-", "_").strip("_") for word in arguments if word.startswith("--")}
    if not names & {"resume_from_checkpoint", "overwrite_output_dir"}:
        lines.append("--resume_from_checkpoint")
    return lines


def _last_line(settings: ScriptSettings, container: str | None, module: str) -> str:
    words = ["exec python -m llm.launch job", f'--chain "${{CHAIN:-{settings.chain}}}"', '--script "$0"']
    if settings.nproc:
        words.append(f"--nproc {settings.nproc}")
    if container:
        words.append(f"--container {_quoted(container)}")
    words.append("--")
    if module != DEFAULT_MODULE:
        words.append(_quoted(module))
    words.append('"${OPTIONS[@]}"')
    return " ".join(words)


def _quoted(word: str) -> str:
    """The word, quoted for bash so that nothing in it is expanded."""
    return word if _PLAIN.fullmatch(word) else '"' + re.sub(r'([\\"$`])', r"\\\1", word) + '"'
