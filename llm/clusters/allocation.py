"""The job allocation: the hosts of this job, which of them this is, and what launched this process."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm.clusters.hostlist import expand_hostlist, host_index, is_local_host, unique_hosts
from llm.config.errors import UserError

# Variables that a multi-host launcher sets for each process: its rank, the number of processes, and how many of them
# run on this host. PALS is HPE Cray's launcher; hydra (MPICH, Intel MPI) and PALS both set PMI_*.
_LAUNCHER_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("PALS_RANKID", "PALS_SIZE", "PALS_LOCAL_SIZE"),
)
_SRUN_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "")
_FIRST_PORT = 20000
_NUM_PORTS = 20000
_ONE_PER_HOST = "`python -m llm.launch job` starts one on each host"


@dataclass(frozen=True)
class ProcessLauncher:
    """Environment variables of the program that launched this process on several hosts (mpiexec, srun), as numbers.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_size: number of processes on this host; 1 if no variable says it.
    """

    rank: int
    size: int
    local_size: int


@dataclass(frozen=True)
class JobAllocation:
    """The hosts of this job.

    Attributes:
        hosts: each host once; the rendezvous is on the first one.
        scheduler: the scheduler that allocated them; None outside a job.
        job: the scheduler's name of the job, such as `123.server`.
        rank: index of this host; None if unknown.
        launcher: mpiexec or srun, if one of them started this process.
        is_explicit: whether the command line named the hosts.
    """

    hosts: tuple[str, ...]
    scheduler: Literal["pbs", "slurm"] | None = None
    job: str | None = None
    rank: int | None = None
    launcher: ProcessLauncher | None = None
    is_explicit: bool = False

    @property
    def is_remote(self) -> bool:
        """Whether the command line names exactly one host, and that is another host than this one."""
        if not self.is_explicit or len(self.hosts) != 1:
            return False
        try:
            return not is_local_host(self.hosts[0])
        except OSError:  # a name without an address is not this host
            return True

    @property
    def port(self) -> int:
        """Port of the rendezvous on the first host; it differs between two jobs that share a host."""
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
    """Read the allocation from the variables of PBS, Slurm or an MPI; without any it is this host alone.

    PBS comes first: on a Slurm cluster that emulates PBS, the job script was written for PBS.

    Args:
        environment: the variables.
        hosts: names separated by commas, used instead of the scheduler's list.
        hostfile: a file with one name a line, used likewise.
        rank: index of this host, used instead of the index of its name or its launcher's rank.
        job: name of the job, used instead of the scheduler's.
        is_step: whether this command runs once on each host; a Slurm step may then have fewer hosts than the job.

    Raises:
        UserError: the list of hosts cannot be read, or the rank is not one of them.
    """
    if hosts is not None and hostfile is not None:
        raise UserError("--hosts and --hostfile say the same; give one of them")
    scheduler: Literal["pbs", "slurm"] | None = None
    if environment.get("PBS_JOBID") or environment.get("PBS_NODEFILE"):
        scheduler = "pbs"
    elif environment.get("SLURM_JOB_ID"):
        scheduler = "slurm"
    this_host = socket.gethostname()
    names = _explicit_hosts(hosts, hostfile) or _scheduler_hosts(scheduler, environment, is_step=is_step)
    unique = unique_hosts(names) or (this_host,)
    if rank is not None and rank >= len(unique):
        raise UserError(f"--rank {rank}: there are {len(unique)} hosts, numbered from 0")
    launcher = _find_launcher(environment, scheduler)
    if rank is None:
        rank = host_index(this_host, unique) if len(unique) > 1 else 0
    if rank is None and launcher is not None and launcher.size == len(unique):
        rank = launcher.rank
    return JobAllocation(
        hosts=unique,
        scheduler=scheduler,
        job=job or environment.get("PBS_JOBID") or environment.get("SLURM_JOB_ID") or None,
        rank=rank,
        launcher=launcher,
        is_explicit=bool(hosts or hostfile),
    )


def job_number(job: str) -> int:
    """Return the number in a job's name; in an array job its index is added: 127 for `123[4].server`."""
    return sum(int(number) for number in re.findall(r"^\D*(\d+)|\[(\d+)\]", job)[:2] for number in number if number)


def check_one_agent_per_host(allocation: JobAllocation) -> None:
    """Refuse a start that gives some host no agent or several; each agent would wait for others that never come.

    Raises:
        UserError: the number of agents is wrong; the message gives the right command.
    """
    num_hosts = len(allocation.hosts)
    launcher = allocation.launcher
    if launcher is None:
        if num_hosts > 1 and not allocation.is_explicit:
            raise UserError(
                f"this job has {num_hosts} hosts, and `launch node` runs on this one alone; {_ONE_PER_HOST}"
            )
        return
    if launcher.size == num_hosts and (launcher.local_size == 1 or num_hosts == 1):
        return
    if allocation.scheduler is None and not allocation.is_explicit:
        raise UserError(
            f"{launcher.size} agents were started, but their hosts are unknown; give --hosts A,B,... (the rendezvous "
            "is on the first one)"
        )
    here = f", {launcher.local_size} here" if launcher.local_size > 1 else ""
    plural = "s" if num_hosts > 1 else ""
    raise UserError(
        f"{launcher.size} agents were started{here}, for {num_hosts} host{plural}: `launch node` runs once on each "
        f"host; {_ONE_PER_HOST}"
    )


def _explicit_hosts(hosts: str | None, hostfile: str | None) -> list[str]:
    """The hosts that the command line names."""
    if hosts is not None:
        names = [name.strip() for name in hosts.split(",")]
        if not all(re.fullmatch(r"[\w.:-]+", name) for name in names):
            raise UserError(f"--hosts {hosts}: must be names of hosts, separated by commas")
        return names
    return _read_hostfile("--hostfile", hostfile) if hostfile is not None else []


def _scheduler_hosts(
    scheduler: Literal["pbs", "slurm"] | None, environment: Mapping[str, str], *, is_step: bool
) -> list[str]:
    """The hosts of the job, repeated as the scheduler repeats them."""
    if scheduler == "pbs" and environment.get("PBS_NODEFILE"):
        return _read_hostfile("PBS_NODEFILE", environment["PBS_NODEFILE"])
    if scheduler != "slurm":
        return []
    names = ["SLURM_JOB_NODELIST", "SLURM_NODELIST"]
    if is_step:
        names.insert(0, "SLURM_STEP_NODELIST")
    hostlist = next((environment[name] for name in names if environment.get(name)), None)
    if not hostlist:
        return []
    try:
        return list(expand_hostlist(hostlist))
    except ValueError as error:
        raise UserError(f"Slurm's list of hosts cannot be read ({error}); give --hosts A,B,...") from None


def _read_hostfile(source: str, name: str) -> list[str]:
    """The host of each line; a host file of mpiexec also holds the number of processes behind the name."""
    try:
        lines = Path(name).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"{source} {name}: cannot be read ({reason}); give --hosts A,B,... instead") from None
    words = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    hosts = [re.sub(r"^([^:]+):\d+$", r"\1", word) for word in words]
    if not hosts:
        raise UserError(f"{source} {name}: holds no hosts")
    return hosts


def _find_launcher(environment: Mapping[str, str], scheduler: str | None) -> ProcessLauncher | None:
    variables = (_SRUN_VARIABLES,) if scheduler == "slurm" else _LAUNCHER_VARIABLES
    for rank, size, local_size in variables:
        if environment.get(rank, "").isdigit() and environment.get(size, "").isdigit():
            local = environment.get(local_size, "")
            return ProcessLauncher(
                rank=int(environment[rank]),
                size=int(environment[size]),
                local_size=int(local) if local.isdigit() else 1,
            )
    return None
