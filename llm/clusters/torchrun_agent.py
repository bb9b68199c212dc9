"""torchrun's agent, of which each host runs one: its command line, its environment, and how its end is reported."""

from __future__ import annotations

import errno
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm.clusters.allocation import JobAllocation
from llm.config.errors import Stopped, UsageError, UserError, first_line

# How long an agent waits for its processes to save after a SIGTERM; the scheduler must wait longer. PBS kills after
# 10 s, Slurm after 30 (KillWait).
_SHUTDOWN_SECONDS = {"pbs": 8, "slurm": 25, None: 30}
# The signals at which a run saves and stops, and those that torchrun forwards by default.
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# How long hosts wait for the first one, which may be slower to load its modules.
_RENDEZVOUS_SECONDS = 300
_FAST_INTERFACE = "hsn0"
_USER_ERROR_CODES = (UserError.exit_code, UsageError.exit_code)
# Set by the launcher of the agent; all processes of the agent would take its rank for theirs.
_LAUNCHER_PREFIXES = ("PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "HYDI_", "PALS_RANKID", "PALS_LOCAL_RANKID")


def agent_command(
    allocation: JobAllocation, arguments: Sequence[str], *, nproc: int, max_restarts: int, port: int | None = None
) -> list[str]:
    """Return the command that runs torchrun's agent on this host.

    Args:
        allocation: the hosts.
        arguments: `-m`, the module that each process runs, and its options.
        nproc: number of processes on each host.
        max_restarts: how often all of them are restarted because one died.
        port: of the rendezvous on the first host; None for the job's port.
    """
    num_hosts = len(allocation.hosts)
    command = [sys.executable, "-m", "llm.launch", "agent"]
    command += ["--nnodes", str(num_hosts), "--nproc_per_node", str(nproc), "--rdzv_backend", "c10d"]
    if num_hosts == 1 and allocation.job is None and port is None:
        # One host outside a job takes any free port, so that two runs on one machine never share a rendezvous.
        command += ["--rdzv_endpoint", "localhost:0", "--rdzv_id", f"none-{os.getpid()}"]
    else:
        first = allocation.hosts[0]
        address = f"[{first}]" if ":" in first else first
        command += ["--rdzv_endpoint", f"{address}:{port or allocation.port}"]
        command += ["--rdzv_id", f"llm-{allocation.job or 'none'}", "--rdzv_conf", _rendezvous_config(allocation)]
        if allocation.rank is not None:
            # By default torchrun uses the host's own name, which the other hosts may be unable to resolve.
            command += ["--local_addr", allocation.hosts[allocation.rank]]
    return [*command, "--max_restarts", str(max_restarts), *arguments]


def run_agent(arguments: Sequence[str]) -> int:
    """Run torchrun's agent in this process until its processes have ended; failures are one line, not a traceback.

    Args:
        arguments: torchrun's own.

    Returns:
        0 if all processes succeeded; 128 + the signal's number if a signal ended them.

    Raises:
        UserError: a process failed more often than it may be restarted, or the rendezvous failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    host = socket.gethostname()
    try:
        run(parse_args(list(arguments)))
    except SignalException as signal_error:
        return 128 + int(signal_error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was ended by {failure.signal_name()}" if code < 0 else f"ended with exit code {code}"
        raise UserError(f"rank {rank} on {host} {how} and is not restarted; see its messages above") from None
    except RendezvousError as error:
        raise UserError(
            f"{host} did not reach the other hosts ({first_line(error)}); `python -m llm.launch doctor` finds the cause"
        ) from None
    return 0


def agent_environment(
    allocation: JobAllocation,
    environment: Mapping[str, str],
    *,
    nproc: int,
    num_cores: int,
    interface: str | None,
) -> dict[str, str]:
    """Return the variables of the agent and its processes.

    Args:
        allocation: the hosts.
        environment: the variables of this process.
        nproc: number of processes on this host.
        num_cores: number of cores that they share.
        interface: network interface between the hosts; None for hsn0 if this host has it.
    """
    variables = {name: value for name, value in environment.items() if not name.startswith(_LAUNCHER_PREFIXES)}
    # Without it torch 2.13 restarts nothing: the processes then use the agents' store, which ends with them.
    variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # As variables, because torch before 2.12 would refuse the options.
    variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(_SHUTDOWN_SECONDS[allocation.scheduler])
    variables["PET_SIGNALS_TO_HANDLE"] = _SIGNALS
    # PBS presets the number for one process on the host; elsewhere the user has set it.
    if allocation.scheduler == "pbs" or not variables.get("OMP_NUM_THREADS"):
        variables["OMP_NUM_THREADS"] = str(max(1, num_cores // nproc))
    if "TMPDIR" in variables and not os.path.isdir(variables["TMPDIR"]):
        del variables["TMPDIR"]  # PBS made it on the first host only
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if interface:
            variables[name] = interface
        elif _has_interface(_FAST_INTERFACE):
            variables.setdefault(name, _FAST_INTERFACE)
    return variables


def check_rendezvous(allocation: JobAllocation, *, port: int | None, interface: str | None) -> None:
    """Refuse what would cost minutes of waiting: an unknown interface, an unknown first host, a port that is in use.

    Raises:
        UserError: one of them is the case; the message says what to change.
    """
    if interface is not None and not _has_interface(interface):
        names = ", ".join(name for _, name in socket.if_nameindex())
        raise UserError(
            f"--interface {interface}: {socket.gethostname()} has no interface of this name; it has {names}"
        )
    if len(allocation.hosts) > 1:
        _check_known(allocation.hosts[0])
    if allocation.rank == 0 and (len(allocation.hosts) > 1 or allocation.job is not None or port is not None):
        _check_free(port or allocation.port)


def run_worker(arguments: Sequence[str]) -> int:
    """Run a trainer in this process as `python -m` would, and hide exits from the agent that need no restart.

    The agent would restart a run that has stopped with everything saved, a few seconds before the end of the job:
    this function then returns 0. The agent also restarts a run that ended because of a user error: the exit code is
    left in a file, and the restarted processes return it at once, without repeating the message.

    Args:
        arguments: the trainer's module and its options; they become `sys.argv`.

    Raises:
        SystemExit: the trainer's own, if it is a failure.
    """
    error_file = user_error_file()
    if error_file is not None and error_file.exists():
        return int(error_file.read_text())
    sys.argv = list(arguments)
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code == Stopped.exit_code:
            return 0
        # Another rank may have failed only because rank 0 crashed, which deserves a restart.
        if error_file is not None and os.environ.get("RANK") == "0" and end.code in _USER_ERROR_CODES:
            error_file.write_text(str(end.code))
        raise
    return 0


def user_error_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the file that holds the exit code of a user error, for processes that this host's agent starts later.

    It is in the agent's own folder, in which torchrun gives each restart and each process a folder; None outside an
    agent.
    """
    error_file = environment.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parents[2] / "mistake" if error_file else None


def count_accelerators() -> int:
    """Return the number of accelerators that a process on this host may use; imports torch."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _rendezvous_config(allocation: JobAllocation) -> str:
    config = f"read_timeout={_RENDEZVOUS_SECONDS},join_timeout={2 * _RENDEZVOUS_SECONDS}"
    if allocation.rank is None:
        return config
    # Given, because the first host may not recognise its name in the scheduler's list as its own.
    return f"{config},is_host={1 if allocation.rank == 0 else 0}"


def _has_interface(name: str) -> bool:
    return any(name == other for _, other in socket.if_nameindex())


def _check_known(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:  # other errors, such as a slow name server, may pass
            raise UserError(
                f"{socket.gethostname()} cannot resolve {host}, the host of the rendezvous; give the name that all "
                "hosts know"
            ) from None


def _check_free(port: int) -> None:
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
                    f"port {port} of {socket.gethostname()}, which the rendezvous needs, is in use (by another run of "
                    "this job?); choose another one with --port"
                ) from None
