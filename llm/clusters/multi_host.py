"""Run a command of `llm.launch` once on every host of the job, and wait for all of them."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from llm.clusters.allocation import JobAllocation
from llm.clusters.mpi_launchers import find_mpiexec, mpiexec_prefix, srun_prefix, without_variables
from llm.config.errors import UserError

log = logging.getLogger(__name__)

_TERMINATE_GRACE_SECONDS = 5.0
_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run_on_all_hosts(
    allocation: JobAllocation,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    command: str = "node",
    container: str | None = None,
    limit_seconds: float | None = None,
) -> int:
    """Run `llm.launch node` once on each host and wait until the program that launched them ends.

    Args:
        allocation: the hosts.
        arguments: what follows `llm.launch node --hosts ... --job ...`.
        environment: the variables of the command on every host.
        command: of `llm.launch`, if another one than node.
        container: a command that is put before python.
        limit_seconds: how long it may take; None for no limit.

    Returns:
        The exit code; 128 + the signal's number if a signal ended it.

    Raises:
        UserError: mpiexec, srun or the container's program is missing, or the command did not end in time.
    """
    python = [*_container_command(container, environment), "python"] if container else [sys.executable]
    rendezvous: list[str] = []
    if len(allocation.hosts) > 1 or allocation.job:
        rendezvous = ["--hosts", ",".join(allocation.hosts), "--job", allocation.job or f"none-{os.getpid()}"]
    agent = [*python, "-m", "llm.launch", command, *rendezvous, *arguments]
    with tempfile.TemporaryDirectory(prefix="llm-launch-") as folder:
        prefix = _launcher_prefix(allocation, environment, Path(folder) / "hosts")
        # The trainer's options are left out, because one may be a secret; the trainer itself logs the others.
        visible = agent[: agent.index("--")] if "--" in agent else agent
        log.info("starting: %s", shlex.join([*without_variables(prefix), *visible]))
        return _run(
            [*prefix, *agent],
            environment,
            forwards_signals=_is_only_sender(allocation, environment),
            limit_seconds=limit_seconds,
        )


def _launcher_prefix(allocation: JobAllocation, environment: Mapping[str, str], hostfile: Path) -> list[str]:
    """The words of srun or mpiexec, whose host file is written here; none if this host runs the command itself."""
    num_hosts = len(allocation.hosts)
    if allocation.scheduler == "slurm":
        return srun_prefix(num_hosts, environment)
    if num_hosts == 1 and not allocation.is_remote:
        return []
    hostfile.write_text("".join(f"{host}\n" for host in allocation.hosts))
    program, launcher = find_mpiexec(environment)
    log.info("hosts: %d, started by %s", num_hosts, launcher.name)
    return mpiexec_prefix(program, launcher, hostfile, num_hosts, environment)


def _container_command(container: str, environment: Mapping[str, str]) -> list[str]:
    try:
        words = shlex.split(container)
    except ValueError as error:
        raise UserError(f"--container {container}: cannot be read as a command ({error})") from None
    if not words or shutil.which(words[0], path=environment.get("PATH")) is None:
        raise UserError(f"--container {container}: the program is not on PATH; load its module, or give its path")
    return words


def _run(
    command: Sequence[str], environment: Mapping[str, str], *, forwards_signals: bool, limit_seconds: float | None
) -> int:
    with (
        subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL) as child,
        _outliving(child, forwards_signals=forwards_signals),
    ):
        try:
            code = child.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            _stop(child)
            raise UserError(
                f"{Path(command[0]).name} did not end within {limit_seconds:.0f} s: check that it reaches every host"
            ) from None
    return code if code >= 0 else 128 - code


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Terminate the child, and kill it if needed: an mpiexec that waits for a silent host may ignore SIGTERM."""
    child.terminate()
    try:
        child.wait(_TERMINATE_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()


@contextmanager
def _outliving(child: subprocess.Popen[bytes], *, forwards_signals: bool) -> Iterator[None]:
    """Ignore the signals that stop a run: the child saves and ends, and this process reports how it ended."""

    def on_signal(number: int, _: FrameType | None) -> None:
        log.info("%s: waiting for the processes to save", signal.Signals(number).name)
        if forwards_signals and number != signal.SIGINT:  # a terminal sends SIGINT to both processes
            child.send_signal(number)

    previous = {number: signal.signal(number, on_signal) for number in _FORWARDED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_only_sender(allocation: JobAllocation, environment: Mapping[str, str]) -> bool:
    """Whether only this process signals the child; a scheduler that ends a batch job signals all its processes."""
    return allocation.scheduler is None or environment.get("PBS_ENVIRONMENT") == "PBS_INTERACTIVE"
