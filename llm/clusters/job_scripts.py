"""Job scripts of PBS and Slurm, as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llm.clusters.sites import Scheduler, Site
from llm.clusters.trainer_command import DEFAULT
from llm.config.errors import UserError
from llm.system.units import format_duration

# What a word may be that is not quoted in the script.
_PLAIN = re.compile(r"[\w./:@%+,=-]+")
_JOB_NAME = re.compile(r"[A-Za-z][\w.-]{0,62}")
_DIRECTIVE_VALUE = re.compile(r"[\w.@:/+-]+")
_PLACEHOLDER = "ALLOCATION"
# First line, mark of a directive, how variables are given, and where the job was submitted. At PBS a job starts in
# a fresh environment, so that a login shell has to make the module command.
_SPELLINGS = {
    "pbs": ("#!/bin/bash -l", "#PBS", "qsub -v ", "PBS_O_WORKDIR"),
    "slurm": ("#!/bin/bash", "#SBATCH", "sbatch --export=ALL,", "SLURM_SUBMIT_DIR"),
}
DEFAULT_SETUP = ('export PATH="$PWD/.venv/bin:$PATH"',)


@dataclass(frozen=True)
class Request:
    """What a job asks for.

    Attributes:
        name: of the job.
        nodes: hosts.
        walltime_seconds: longest time of the job.
        account: project that pays; None leaves a name to be filled in.
        queue: None for the site's.
        chain: jobs that the run may take in all.
        nproc: processes on each host; None to find out there.
        setup: shell lines that make python the right one.
        container: what stands before python; None for the site's.
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


def job_script(scheduler: Scheduler, site: Site, request: Request, module: str, words: Sequence[str]) -> str:
    """The whole script, which also runs in an interactive allocation and on a machine without a scheduler.

    Args:
        scheduler: whose.
        site: where it is to run.
        request: what the job asks for.
        module: the trainer.
        words: its options, which stay as they are.

    Raises:
        UserError: a word that no scheduler would read as it was meant.
    """
    _check(request)
    shell, sign, submit, folder = _SPELLINGS[scheduler]
    fixed, account, hosts = _directives(scheduler, site, request)
    lines = [
        shell,
        f"# `{submit}CONFIG=my.toml,CHAIN=4 FILE` is another run, in up to 4 jobs. Also runs without a scheduler.",
        *(f"{sign} {line}" for line in fixed),
        "# Edit 1 of 3: the project that pays",
        f"{sign} {account}",
        "# Edit 2 of 3: the hosts",
        *(f"{sign} {line}" for line in hosts),
        "",
        "set -euo pipefail",
        f'cd "${{{folder}:-$PWD}}"',
        *_site_lines(site),
        "# Edit 3 of 3: the environment that holds this package",
        *request.setup,
        "",
        "OPTIONS=(",
        *(f"  {line}" for line in _option_lines(words)),
        ")",
        "# Starts `llm.launch node` once on each host, by mpiexec or srun; ends with 0 done, 75 stopped, 1 failed.",
        _last_line(request, request.container or site.container, module),
    ]
    return "\n".join(lines) + "\n"


def _check(request: Request) -> None:
    if not _JOB_NAME.fullmatch(request.name):
        raise UserError(f"--name {request.name!r}: must be a letter, and letters, digits, `.`, `_` or `-`")
    for flag, value in (("account", request.account), ("queue", request.queue)):
        if value is not None and not _DIRECTIVE_VALUE.fullmatch(value):
            raise UserError(f"--{flag} {value!r}: must be one word, as the scheduler knows it")
    for line in request.setup:
        if "\n" in line:
            raise UserError("--setup: give one line in each word")


def _directives(scheduler: Scheduler, site: Site, request: Request) -> tuple[list[str], str, list[str]]:
    """The lines that stay, the one of the account, and those of the hosts."""
    lines = site.lines(scheduler)
    assert lines is not None
    queue = request.queue or lines.queue
    account = request.account or _PLACEHOLDER
    special = [line.replace("{nodes}", str(request.nodes)) for line in lines.directives]
    hosts = [line for line, raw in zip(special, lines.directives, strict=True) if "{nodes}" in raw]
    others = [line for line in special if line not in hosts]
    walltime = format_duration(max(1, round(request.walltime_seconds)))  # both schedulers read H:MM:SS
    if scheduler == "pbs":
        fixed = [f"-N {request.name}", "-j oe", "-r y", f"-l walltime={walltime}"]
        flag, account = "-q ", f"-A {account}"
    else:
        fixed = [f"--job-name={request.name}", "--output=%x.o%j", "--open-mode=append", "--requeue"]
        fixed += [f"--time={walltime}", "--ntasks-per-node=1"]
        flag, account = f"{lines.queue_flag or '--partition'}=", f"--account={account}"
    return [*fixed, *([f"{flag}{queue}"] if queue else []), *others], account, hosts


def _site_lines(site: Site) -> list[str]:
    """Module systems and conda read variables that are not set."""
    inside = [f"set +u; {'; '.join(site.modules)}; set -u"] if site.modules else []
    pairs = [f"{name}={_quoted(value)}" for name, value in site.environment.items()]
    inside += [f"export {' '.join(pairs)}"] if pairs else []
    return ["if command -v module > /dev/null; then", *(f"  {line}" for line in inside), "fi"] if inside else []


def _option_lines(words: Sequence[str]) -> list[str]:
    """Each flag with its values on a line; a configuration gives way to CONFIG, and a job resumes what is there."""
    lines: list[str] = []
    for number, word in enumerate(words):
        if number and words[number - 1] == "--config" and _PLAIN.fullmatch(word):
            lines[-1] += f' "${{CONFIG:-{word}}}"'
        elif word.startswith("--") or not lines:
            lines.append(_quoted(word))
        else:
            lines[-1] += f" {_quoted(word)}"
    given = {word.partition("=")[0].replace("-", "_").strip("_") for word in words if word.startswith("--")}
    if not given & {"resume_from_checkpoint", "overwrite_output_dir"}:
        lines.append("--resume_from_checkpoint")
    return lines


def _last_line(request: Request, container: str | None, module: str) -> str:
    options = f'--chain "${{CHAIN:-{request.chain}}}" --script "$0"'
    options += f" --nproc {request.nproc}" if request.nproc else ""
    options += f" --container {_quoted(container)}" if container else ""
    trainer = "" if module == DEFAULT else f"{_quoted(module)} "
    return f'exec python -m llm.launch job {options} -- {trainer}"${{OPTIONS[@]}}"'


def _quoted(word: str) -> str:
    """The word as bash has to be given it; nothing in it is expanded."""
    return word if _PLAIN.fullmatch(word) else '"' + re.sub(r'([\\"$`])', r"\\\1", word) + '"'
