"""Where this process is: on which hosts the job runs, which of them this is, and who started it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm.clusters.hostlist import expand, index_of, unique_hosts
from llm.config.errors import UserError

# Of the programs that start one process on each host: number of this one, of all, and of those on this host.
# PALS is HPE Cray's; hydra (MPICH, Intel MPI) and PALS both set PMI_*.
_STARTERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("PALS_RANKID", "PALS_SIZE", "PALS_LOCAL_SIZE"),
)
_SLURM_STARTER = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "")
_FIRST_PORT, _NUM_PORTS = 20000, 20000


@dataclass(frozen=True)
class ProcessLauncher:
    """What the program that started this process on several hosts says in its variables.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_size: of these, how many are on this host; 1 where nothing says it.
    """

    rank: int
    size: int
    local_size: int


@dataclass(frozen=True)
class JobAllocation:
    """The hosts of this job.

    Attributes:
        hosts: each once; all meet at the first one.
        scheduler: who gave them; None without a job.
        job: the scheduler's name of the job, such as `123.server`.
        rank: number of this host; None where nothing says it.
        starter: the program that started this process, if it was one of mpiexec's or srun's kind.
        is_told: whether the hosts were named on the command line.
    """

    hosts: tuple[str, ...]
    scheduler: Literal["pbs", "slurm"] | None = None
    job: str | None = None
    rank: int | None = None
    starter: ProcessLauncher | None = None
    is_told: bool = False

    @property
    def is_elsewhere(self) -> bool:
        """Whether the command line names one host, and not this one."""
        return self.is_told and len(self.hosts) == 1 and not is_here(self.hosts[0])

    @property
    def port(self) -> int:
        """Where the hosts meet: not the same for two jobs that share a host."""
        return _FIRST_PORT + job_number(self.job or "") % _NUM_PORTS


def find_allocation(
    environment: Mapping[str, str] = os.environ,
    *,
    hosts: str | None = None,
    hostfile: str | None = None,
    rank: int | None = None,
    job: str | None = None,
    is_step: bool = True,
) -> JobAllocation:
    """The place that the variables of PBS, Slurm or an MPI describe; this host alone where there are none.

    PBS comes first: where a Slurm cluster plays PBS, the script was written for PBS.

    Args:
        environment: the variables.
        hosts: their names with commas, instead of what the scheduler says.
        hostfile: a file with one a line, likewise.
        rank: number of this host among them, instead of what its name or its starter says.
        job: its name, instead of the scheduler's.
        is_step: whether this runs once on each host, where Slurm's step may have fewer hosts than the job.

    Raises:
        UserError: the hosts cannot be read.
    """
    if hosts is not None and hostfile is not None:
        raise UserError("--hosts and --hostfile say the same; give one of them")
    scheduler: Literal["pbs", "slurm"] | None = None
    if environment.get("PBS_JOBID") or environment.get("PBS_NODEFILE"):
        scheduler = "pbs"
    elif environment.get("SLURM_JOB_ID"):
        scheduler = "slurm"
    names = _named(hosts, hostfile) or _scheduled(scheduler, environment, is_step=is_step)
    this = socket.gethostname()
    found = unique_hosts(names) or (this,)
    starter = _starter(environment, scheduler)
    if rank is not None and rank >= len(found):
        raise UserError(f"--rank {rank}: there are {len(found)} hosts, numbered from 0")
    if rank is None:
        rank = index_of(this, found) if len(found) > 1 else 0
    if rank is None and starter is not None and starter.size == len(found):
        rank = starter.rank
    named = environment.get("PBS_JOBID") or environment.get("SLURM_JOB_ID")
    return JobAllocation(found, scheduler, job or named or None, rank, starter, bool(hosts or hostfile))


def is_here(host: str) -> bool:
    """Whether a name is this host's: its own one, or one of an address that a program can listen at here."""
    if index_of(socket.gethostname(), [host]) is not None:
        return True
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def job_number(job: str) -> int:
    """The number in a job's name, and of a job in an array that number and its index: 7 of `123[4].server` is 127."""
    return sum(int(number) for number in re.findall(r"^\D*(\d+)|\[(\d+)\]", job)[:2] for number in number if number)


def check_agents(place: JobAllocation) -> None:
    """Refuses a start in which not every host gets exactly one agent; each would wait for others that never come.

    Raises:
        UserError: and what would be right.
    """
    count, starter = len(place.hosts), place.starter
    right = "`python -m llm.launch job` starts one on each host"
    if starter is None:
        if count > 1 and not place.is_told:
            raise UserError(f"this job has {count} hosts, and `launch node` runs on this one alone; {right}")
        return
    if starter.size == count and (starter.local_size == 1 or count == 1):
        return
    if place.scheduler is None and not place.is_told:
        raise UserError(
            f"{starter.size} of these were started, and nothing says on which hosts; give --hosts A,B,... (the first "
            "is where they meet)"
        )
    some = f"{starter.size} of these were started" + (f", {starter.local_size} here" if starter.local_size > 1 else "")
    raise UserError(f"{some}, for {count} host{'s' * (count > 1)}: `launch node` runs once on each host; {right}")


def _named(hosts: str | None, hostfile: str | None) -> list[str]:
    """The hosts of the command line."""
    if hosts is not None:
        names = [name.strip() for name in hosts.split(",")]
        if not all(re.fullmatch(r"[\w.:-]+", name) for name in names):
            raise UserError(f"--hosts {hosts}: must be names of hosts with commas between them")
        return names
    return _lines("--hostfile", hostfile) if hostfile is not None else []


def _scheduled(
    scheduler: Literal["pbs", "slurm"] | None, environment: Mapping[str, str], *, is_step: bool
) -> list[str]:
    """The hosts of the job, repeated as the scheduler repeats them."""
    if scheduler == "pbs" and environment.get("PBS_NODEFILE"):
        return _lines("PBS_NODEFILE", environment["PBS_NODEFILE"])
    if scheduler == "slurm":
        names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")[0 if is_step else 1 :]
        listed = next((environment[name] for name in names if environment.get(name)), None)
        try:
            return list(expand(listed)) if listed else []
        except ValueError as error:
            raise UserError(f"Slurm's list of hosts cannot be read ({error}); give --hosts A,B,...") from None
    return []


def _lines(source: str, name: str) -> list[str]:
    """The host of each line: mpiexec's own files have numbers of processes behind it."""
    try:
        lines = Path(name).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"{source} {name}: cannot be read ({reason}); --hosts A,B,... names the hosts") from None
    words = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    found = [re.sub(r"^([^:]+):\d+$", r"\1", word) for word in words]
    if not found:
        raise UserError(f"{source} {name}: holds no hosts")
    return found


def _starter(environment: Mapping[str, str], scheduler: str | None) -> ProcessLauncher | None:
    kinds = (_SLURM_STARTER,) if scheduler == "slurm" else _STARTERS
    for rank, size, local_size in kinds:
        if environment.get(rank, "").isdigit() and environment.get(size, "").isdigit():
            local = environment.get(local_size, "")
            return ProcessLauncher(int(environment[rank]), int(environment[size]), int(local) if local.isdigit() else 1)
    return None
