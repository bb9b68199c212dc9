"""The words with which mpiexec (of each MPI) and srun start one process on each host."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm.config.errors import UserError

_TIMEOUT_SECONDS = 30.0
# Names of variables that hold secrets, and values that do, such as the address of a proxy with a password in it: every
# user of the host can read a command line.
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|PASSPHRASE|CREDENTIAL", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/@\s]*:[^/@\s]+@")
# Variables that each host has for itself, or that the launcher sets for each process.
_LOCAL_NAME = re.compile(
    r"PWD|OLDPWD|SHLVL|_|HOST|HOSTNAME|TMPDIR|DISPLAY|TERM|LS_COLORS|PBS_NODEFILE|"
    r"(SSH|XDG|PMI|PMIX|OMPI|PRTE|PALS|HYDI?|SLURM|SBATCH|SRUN|BASH_FUNC|_ModuleTable|MPI_LOCAL)\w*"
)
_NAME = re.compile(r"[A-Za-z_]\w*")
# hydra keeps the arguments in an array of a fixed size; a module system's internal variables would fill it.
_MAX_VALUE_LENGTH = 16_384


@dataclass(frozen=True)
class MpiLauncher:
    """A kind of mpiexec.

    Attributes:
        name: its usual name.
        pattern: what its `--version`, or the path of the program, contains.
        placement: options that start one process on each host, which may use all cores.
        forward_option: option before the name of a variable that is to be passed on; "" if all are passed on.
    """

    name: str
    pattern: re.Pattern[str]
    placement: tuple[str, ...]
    forward_option: str = ""


# Open MPI counts the cores of a host without slots= as slots, and fills the first host; Open MPI and PALS would bind
# the one process to one core.
MPI_LAUNCHERS = (
    MpiLauncher("PALS", re.compile(r"\bPALS\b", re.IGNORECASE), ("--ppn", "1", "--cpu-bind", "none")),
    MpiLauncher(
        "Open MPI",
        re.compile(r"Open ?MPI|OpenRTE|PRRTE|PRTE", re.IGNORECASE),
        ("--map-by", "ppr:1:node", "--bind-to", "none"),
        forward_option="-x",
    ),
    MpiLauncher("MPICH", re.compile(r"HYDRA|MPICH|Intel\(R\) MPI", re.IGNORECASE), ("-ppn", "1")),
)
UNKNOWN_LAUNCHER = MpiLauncher("an unknown mpiexec", re.compile(""), ())


def find_mpiexec(environment: Mapping[str, str]) -> tuple[str, MpiLauncher]:
    """Return the path of the mpiexec on PATH, and its kind.

    Raises:
        UserError: there is no mpiexec, or it does not answer.
    """
    program = shutil.which("mpiexec", path=environment.get("PATH"))
    if program is None:
        raise UserError("several hosts need an mpiexec, and there is none on PATH; load the module of an MPI")
    try:
        result = subprocess.run(
            [program, "--version"],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{program} --version gives no answer ({error}); load the module of another MPI") from None
    text = f"{result.stdout}\n{result.stderr}\n{Path(program).resolve()}"
    return program, next((kind for kind in MPI_LAUNCHERS if kind.pattern.search(text)), UNKNOWN_LAUNCHER)


def mpiexec_prefix(
    program: str, launcher: MpiLauncher, hostfile: Path, num_hosts: int, environment: Mapping[str, str]
) -> list[str]:
    """Return the words before a command that make mpiexec run it once on each host.

    Variables are passed as `env NAME=VALUE`, the one form that all kinds share. Secrets never stand on the command
    line: they are named with `forward_option` where there is one. Host-specific variables, and values of more than
    16,384 characters, are left out.

    Args:
        program: path of mpiexec.
        launcher: its kind.
        hostfile: a file with one host a line, each once.
        num_hosts: number of its lines.
        environment: the environment of this process.
    """
    passed_on = {name: value for name, value in environment.items() if _is_passed_on(name)}
    secrets = [name for name, value in passed_on.items() if _SECRET_NAME.search(name) or _SECRET_VALUE.search(value)]
    words = [program, "--hostfile", str(hostfile), "-np", str(num_hosts), *launcher.placement]
    if launcher.forward_option:
        for name in secrets:
            words += [launcher.forward_option, name]
    words.append("env")
    for name, value in passed_on.items():
        if name not in secrets and len(value) <= _MAX_VALUE_LENGTH:
            words.append(f"{name}={value}")
    return words


def srun_prefix(num_hosts: int, environment: Mapping[str, str]) -> list[str]:
    """Return the words before a command that make srun run it once on each host of a Slurm job.

    Every option is given, because srun takes a missing one from the variables of the job's submission.

    Raises:
        UserError: there is no srun.
    """
    program = shutil.which("srun", path=environment.get("PATH"))
    if program is None:
        raise UserError("this is a Slurm job, but there is no srun on PATH; add its folder to PATH")
    count = str(num_hosts)
    placement = ["--nodes", count, "--ntasks", count, "--ntasks-per-node", "1", "--cpu-bind=none"]
    # An agent that fails must not end the others, which may be saving.
    return [program, *placement, "--kill-on-bad-exit=0", "--export=ALL"]


def without_variables(words: Sequence[str]) -> list[str]:
    """Return the words without `NAME=VALUE`, for a log line."""
    return [word for word in words if not re.match(r"[A-Za-z_]\w*=", word)]


def _is_passed_on(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and _LOCAL_NAME.fullmatch(name) is None
