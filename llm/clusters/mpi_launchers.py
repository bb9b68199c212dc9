"""How each program that starts processes on several hosts is told to start one on each."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm.config.errors import UserError

_PATIENCE_SECONDS = 30.0
# Names of variables that hold secrets, and values that do, such as a proxy's address with a password in it: a
# command line can be read by everybody on the host.
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|PASSPHRASE|CREDENTIAL", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/@\s]*:[^/@\s]+@")
# A variable that each host has of its own, or the starting program sets for each process.
_LOCAL = re.compile(
    r"PWD|OLDPWD|SHLVL|_|HOST|HOSTNAME|TMPDIR|DISPLAY|TERM|LS_COLORS|PBS_NODEFILE|"
    r"(SSH|XDG|PMI|PMIX|OMPI|PRTE|PALS|HYDI?|SLURM|SBATCH|SRUN|BASH_FUNC|_ModuleTable|MPI_LOCAL)\w*"
)
_NAME = re.compile(r"[A-Za-z_]\w*")
# A list that hydra holds in an array of a fixed size must not grow with a module system's own notes.
_LONGEST_VALUE = 16_384


@dataclass(frozen=True)
class Launcher:
    """A kind of mpiexec.

    Attributes:
        name: as people call it.
        sign: what its `--version`, or the path of the program, says.
        placing: one process on each host, which may use all its cores.
        forwards: option before the name of a variable that is to be passed on; "" where all are.
    """

    name: str
    sign: re.Pattern[str]
    placing: tuple[str, ...]
    forwards: str = ""


# Open MPI counts the cores of a host without slots= as slots, and fills the first host; it and PALS would bind
# the one process to one core.
LAUNCHERS = (
    Launcher("PALS", re.compile(r"\bPALS\b", re.IGNORECASE), ("--ppn", "1", "--cpu-bind", "none")),
    Launcher(
        "Open MPI",
        re.compile(r"Open ?MPI|OpenRTE|PRRTE|PRTE", re.IGNORECASE),
        ("--map-by", "ppr:1:node", "--bind-to", "none"),
        forwards="-x",
    ),
    Launcher("MPICH", re.compile(r"HYDRA|MPICH|Intel\(R\) MPI", re.IGNORECASE), ("-ppn", "1")),
)
UNKNOWN = Launcher("an unknown mpiexec", re.compile(""), ())


def find_launcher(environment: Mapping[str, str]) -> tuple[str, Launcher]:
    """The path of mpiexec, and its kind.

    Raises:
        UserError: there is none, or it does not answer.
    """
    program = shutil.which("mpiexec", path=environment.get("PATH"))
    if program is None:
        raise UserError("several hosts need an mpiexec, and there is none on PATH; load the module of an MPI")
    try:
        said = subprocess.run(
            [program, "--version"],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{program} --version gives no answer ({error}); load the module of another MPI") from None
    text = f"{said.stdout}\n{said.stderr}\n{Path(program).resolve()}"
    return program, next((kind for kind in LAUNCHERS if kind.sign.search(text)), UNKNOWN)


def mpiexec_line(
    program: str, launcher: Launcher, hostfile: Path, num_hosts: int, environment: Mapping[str, str]
) -> list[str]:
    """What stands before the command that is to run once on each host.

    Variables are given as `env NAME=VALUE`, the one spelling that all kinds share; secrets never are.

    Args:
        program: path of mpiexec.
        launcher: its kind.
        hostfile: a host a line, each once.
        num_hosts: lines of it.
        environment: the variables that the command is to have.
    """
    secrets = [
        name
        for name, value in environment.items()
        if _is_passed_on(name) and (_SECRET.search(name) or _SECRET_VALUE.search(value))
    ]
    forwarded = [word for name in secrets for word in (launcher.forwards, name) if launcher.forwards]
    pairs = [
        f"{name}={value}"
        for name, value in environment.items()
        if _is_passed_on(name) and name not in secrets and len(value) <= _LONGEST_VALUE
    ]
    start = [program, "--hostfile", str(hostfile), "-np", str(num_hosts), *launcher.placing, *forwarded]
    return [*start, "env", *pairs]


def srun_line(num_hosts: int, environment: Mapping[str, str]) -> list[str]:
    """What stands before the command that is to run once on each host of a Slurm job.

    Every choice is made here, since srun takes what is not from variables that the job was submitted with.

    Raises:
        UserError: there is no srun.
    """
    program = shutil.which("srun", path=environment.get("PATH"))
    if program is None:
        raise UserError("this is a Slurm job, but there is no srun on PATH; add the folder that has it")
    count = str(num_hosts)
    placing = ["--nodes", count, "--ntasks", count, "--ntasks-per-node", "1", "--cpu-bind=none"]
    # An agent that fails must not end the others, which may be saving.
    return [program, *placing, "--kill-on-bad-exit=0", "--export=ALL"]


def shown(line: Sequence[str]) -> list[str]:
    """What stands before the command, without the variables, for people."""
    return [word for word in line if not re.match(r"[A-Za-z_]\w*=", word)]


def _is_passed_on(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and _LOCAL.fullmatch(name) is None
