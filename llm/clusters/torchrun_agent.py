"""torchrun's agent, of which each host runs one: its command line and its environment."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm.clusters.allocation import JobAllocation
from llm.config.errors import UserError, first_line

# How long an agent waits for its processes to save after a SIGTERM: less than the scheduler waits for it. PBS
# kills after 10 s, Slurm after 30 (KillWait).
_SHUTDOWN_SECONDS = {"pbs": 8, "slurm": 25, None: 30}
# Those at which a run saves and stops, and what torchrun passes on by itself.
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# How long hosts wait for the first one, which may be slower to load its modules.
_MEETING_SECONDS = 300
_FAST_INTERFACE = "hsn0"
# Of the program that started the agent; its processes would all answer to its one number.
_STARTERS_OWN = ("PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "HYDI_", "PALS_RANKID", "PALS_LOCAL_RANKID")


def agent_command(
    place: JobAllocation, words: Sequence[str], *, nproc: int, max_restarts: int, port: int | None = None
) -> list[str]:
    """The command that runs torchrun's agent on this host.

    Args:
        place: the hosts.
        words: `-m`, the module that each process runs, and its options.
        nproc: processes on each host.
        max_restarts: times that they are all started again because one of them died.
        port: on the first host; the job's own when None.
    """
    command = [sys.executable, "-m", "llm.launch", "agent"]
    command += ["--nnodes", str(len(place.hosts)), "--nproc_per_node", str(nproc), "--rdzv_backend", "c10d"]
    if len(place.hosts) == 1 and place.job is None and port is None:
        # Alone and in no job: any free port, so that two runs on one machine never meet.
        command += ["--rdzv_endpoint", "localhost:0", "--rdzv_id", f"none-{os.getpid()}"]
    else:
        first = f"[{place.hosts[0]}]" if ":" in place.hosts[0] else place.hosts[0]
        command += ["--rdzv_endpoint", f"{first}:{port or place.port}", "--rdzv_id", f"llm-{place.job or 'none'}"]
        command += ["--rdzv_conf", _meeting(place)]
        if place.rank is not None:
            # Else it would be the name that the host gives itself, which the others may not know.
            command += ["--local_addr", place.hosts[place.rank]]
    return [*command, "--max_restarts", str(max_restarts), *words]


def run_agent(words: Sequence[str]) -> int:
    """Is torchrun's agent until its processes have ended, with one line in place of torchrun's traceback.

    Args:
        words: torchrun's own.

    Returns:
        0 when all processes ended well; 128 + the signal's number if a signal ended them.

    Raises:
        UserError: a process failed once too often, or the hosts did not meet.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    here = socket.gethostname()
    try:
        run(parse_args(list(words)))
    except SignalException as end:
        return 128 + int(end.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was ended by {failure.signal_name()}" if code < 0 else f"ended with exit code {code}"
        raise UserError(f"rank {rank} on {here} {how}, and is not started again; what it said stands above") from None
    except RendezvousError as error:
        raise UserError(
            f"{here} did not meet the other hosts ({first_line(error)});"
            " `python -m llm.launch doctor` says what to mend"
        ) from None
    return 0


def agent_environment(
    place: JobAllocation, environment: Mapping[str, str], *, nproc: int, num_cores: int, interface: str | None
) -> dict[str, str]:
    """The variables of the agent and its processes.

    Args:
        place: the hosts.
        environment: the variables here.
        nproc: processes on this host.
        num_cores: cores that they may use together.
        interface: network interface between the hosts; None is hsn0 where there is one.
    """
    kept = {name: value for name, value in environment.items() if not name.startswith(_STARTERS_OWN)}
    # Without it torch 2.13 starts no process again: the agents' store is the processes' own, and is gone with them.
    kept["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # As variables: torch before 2.12 would refuse the options.
    kept["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(_SHUTDOWN_SECONDS[place.scheduler])
    kept["PET_SIGNALS_TO_HANDLE"] = _SIGNALS
    # PBS presets the number for one process on the host; elsewhere a number is its user's.
    if place.scheduler == "pbs" or not kept.get("OMP_NUM_THREADS"):
        kept["OMP_NUM_THREADS"] = str(max(1, num_cores // nproc))
    if "TMPDIR" in kept and not os.path.isdir(kept["TMPDIR"]):
        del kept["TMPDIR"]  # PBS made it on the first host only
    found = interface or (_FAST_INTERFACE if _has_interface(_FAST_INTERFACE) else None)
    if found is not None:
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            kept[name] = found if interface else kept.get(name, found)
    return kept


def check_meeting(place: JobAllocation, *, port: int | None, interface: str | None) -> None:
    """Refuses what costs minutes of waiting: an interface or a first host that nobody knows, a port that is taken.

    Raises:
        UserError: and the mend.
    """
    if interface is not None and not _has_interface(interface):
        names = ", ".join(name for _, name in socket.if_nameindex())
        raise UserError(
            f"--interface {interface}: there is none of that name on {socket.gethostname()}; it has {names}"
        )
    if len(place.hosts) > 1:
        _refuse_unknown(place.hosts[0])
    if place.rank == 0 and (len(place.hosts) > 1 or place.job is not None or port is not None):
        _refuse_taken(port or place.port)


def mistake_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where a process leaves the exit code of a mistake for those that this host's agent starts after it.

    It is in the agent's own folder, in which torchrun gives each of its starts and processes one; None without it.
    """
    own = environment.get("TORCHELASTIC_ERROR_FILE")
    return Path(own).parents[2] / "mistake" if own else None


def count_accelerators() -> int:
    """Accelerators that a process here may use; imports torch."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _meeting(place: JobAllocation) -> str:
    settings = f"read_timeout={_MEETING_SECONDS},join_timeout={2 * _MEETING_SECONDS}"
    # Said, because the name in the scheduler's list may not be one that the first host knows itself by.
    return settings if place.rank is None else f"{settings},is_host={int(place.rank == 0)}"


def _has_interface(name: str) -> bool:
    return any(name == found for _, found in socket.if_nameindex())


def _refuse_unknown(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:  # others, such as a name server that is slow, may pass
            raise UserError(
                f"{socket.gethostname()} knows no host {host}, where all hosts meet; give the name that all know"
            ) from None


def _refuse_taken(port: int) -> None:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            listener.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"port {port} of {socket.gethostname()}, where the hosts would meet, is taken (does another run of "
                    "this job go on?); choose another with --port"
                ) from None
