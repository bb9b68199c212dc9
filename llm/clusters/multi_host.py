"""Starts an agent on every host of the job, and waits for them."""

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
from llm.clusters.mpi_launchers import find_launcher, mpiexec_line, shown, srun_line
from llm.config.errors import UserError

log = logging.getLogger(__name__)

_GRACE_SECONDS = 5.0
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def spread(
    place: JobAllocation,
    words: Sequence[str],
    environment: Mapping[str, str],
    *,
    command: str = "node",
    container: str | None = None,
    limit_seconds: float | None = None,
) -> int:
    """Runs `llm.launch node` once on each host; what ends is the program that started them.

    Args:
        place: the hosts.
        words: what follows `llm.launch node --hosts ... --job ...`.
        environment: the variables that it has on every host.
        command: of `llm.launch`, if it is another one than node.
        container: what stands before python.
        limit_seconds: how long it may take; None is for ever.

    Returns:
        The exit code; 128 + the signal's number if a signal ended it.

    Raises:
        UserError: there is no mpiexec, srun or container's program, or what was started did not end in time.
    """
    job = place.job or f"none-{os.getpid()}"
    python = [*_words_of(container, environment), "python"] if container else [sys.executable]
    meeting = ["--hosts", ",".join(place.hosts), "--job", job] if len(place.hosts) > 1 or place.job else []
    node = [*python, "-m", "llm.launch", command, *meeting, *words]
    count = len(place.hosts)
    with tempfile.TemporaryDirectory(prefix="llm-launch-") as folder:
        start: list[str] = []
        if place.scheduler == "slurm":
            start = srun_line(count, environment)
        elif count > 1 or place.is_elsewhere:
            hostfile = Path(folder) / "hosts"
            hostfile.write_text("".join(f"{host}\n" for host in place.hosts))
            program, launcher = find_launcher(environment)
            log.info("hosts: %d, started by %s", count, launcher.name)
            start = mpiexec_line(program, launcher, hostfile, count, environment)
        # Without the trainer's options, of which one may be a secret; the trainer says them, without it.
        visible = node[: node.index("--")] if "--" in node else node
        log.info("starts: %s", shlex.join([*shown(start), *visible]))
        is_alone = _is_alone(place, environment)
        return _wait([*start, *node], environment, passes_signals_on=is_alone, limit_seconds=limit_seconds)


def _words_of(container: str, environment: Mapping[str, str]) -> list[str]:
    try:
        words = shlex.split(container)
    except ValueError as error:
        raise UserError(f"--container {container}: cannot be read as a command ({error})") from None
    if not words or shutil.which(words[0], path=environment.get("PATH")) is None:
        raise UserError(
            f"--container {container}: there is no program of that name here; load its module, or name its path"
        )
    return words


def _wait(
    command: Sequence[str], environment: Mapping[str, str], *, passes_signals_on: bool, limit_seconds: float | None
) -> int:
    with (
        subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL) as child,
        _surviving(child, passes_signals_on),
    ):
        try:
            code = child.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            _end(child)
            raise UserError(
                f"{Path(command[0]).name} did not end within {limit_seconds:.0f} s: see whether it reaches every host"
            ) from None
    return code if code >= 0 else 128 - code


def _end(child: subprocess.Popen[bytes]) -> None:
    """An mpiexec that waits for a host which does not answer may not hear the first word."""
    child.terminate()
    try:
        child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()


@contextmanager
def _surviving(child: subprocess.Popen[bytes], passes_signals_on: bool) -> Iterator[None]:
    """While the block runs a signal ends the child, which saves, and not this process, which says how it ended."""

    def note(number: int, _: FrameType | None) -> None:
        log.info("%s: waiting for the processes to save", signal.Signals(number).name)
        if passes_signals_on and number != signal.SIGINT:  # a terminal sends that one to both
            child.send_signal(number)

    before = {number: signal.signal(number, note) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_alone(place: JobAllocation, environment: Mapping[str, str]) -> bool:
    """Whether nobody else signals the child: a scheduler that ends a batch job signals all its processes."""
    return place.scheduler is None or environment.get("PBS_ENVIRONMENT") == "PBS_INTERACTIVE"
