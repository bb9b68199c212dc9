"""Check an allocation before a run: one agent on each host; together they name the first thing to fix.

The agents share a rendezvous on the first host. The first host leads through the steps, and the others follow. Every
step has a deadline, so that each agent ends whatever is broken, and says what it waited for.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm.clusters.allocation import JobAllocation
from llm.clusters.doctor.collective_checks import AllReduceSpeed, GroupPlan, format_failure, run_processes
from llm.clusters.doctor.host_info import (
    HostInfo,
    collect_host_info,
    device_problem,
    folder_mismatch,
    format_names,
    group_hosts,
    version_mismatch,
)
from llm.clusters.doctor.rendezvous import Rendezvous
from llm.clusters.hostlist import host_index, is_local_host
from llm.config.errors import UserError

# A run stops before the walltime by the clock of the host that reads it, and files are compared by their ages.
_MAX_CLOCK_DIFFERENCE_SECONDS = 5.0
_NUM_CLOCK_ROUNDS = 4
# No host opens a file of another one before it exists: a network filesystem would remember that it is missing.
_MAX_FILE_WAIT_SECONDS = 10.0
_GOODBYE_SECONDS = 5.0
# The first host may use up its time in several steps before it answers the others again.
_STEPS_WITHOUT_ANSWER = 4


@dataclass
class DoctorReport:
    """The result of the checks; only the first host's agent fills it in.

    Attributes:
        lines: the table.
        problem: the first thing to fix; None if there is none.
    """

    lines: list[str] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class _Row:
    """One check: its name, what it measured, and what to fix."""

    name: str
    result: str
    problem: str | None = None


def examine_hosts(
    allocation: JobAllocation, *, nproc: int, use_cpu: bool, folder: Path, port: int | None, seconds: float
) -> DoctorReport:
    """Check the hosts together with the agents on the other hosts.

    Args:
        allocation: the hosts.
        nproc: number of processes on each host.
        use_cpu: whether accelerators are ignored.
        folder: a folder that all hosts should share.
        port: of the rendezvous on the first host; None for the job's port.
        seconds: how long each step may take.

    Raises:
        UserError: this agent cannot reach the first host, or lost it, or this host has too many agents.
    """
    first = allocation.hosts[0]
    is_first = allocation.rank == 0 if allocation.rank is not None else _is_local(first)
    host_info = collect_host_info(nproc, use_cpu=use_cpu)
    address = first
    if len(allocation.hosts) == 1 and allocation.job is None and port is None:
        address = "localhost"
        port = 0  # any free one
    elif port is None:
        port = allocation.port
    rendezvous = Rendezvous(address, port, is_first=is_first, seconds=seconds)
    if is_first:
        return _Leader(rendezvous, allocation, folder, seconds).examine(host_info)
    number = rendezvous.next_number("arrived") + 1
    if number >= len(allocation.hosts):
        raise UserError(
            f"{host_info.name} has an agent too many: start one on each host (mpiexec: one process per host)"
        )
    return _Follower(rendezvous, host_info, number, folder, seconds).examine()


def _is_local(host: str) -> bool:
    try:
        return is_local_host(host)
    except OSError as error:
        raise UserError(
            f"{host} cannot be resolved here ({error}): name the first host as all hosts know it"
        ) from error


class _Leader:
    """The agent on the first host."""

    def __init__(self, rendezvous: Rendezvous, allocation: JobAllocation, folder: Path, seconds: float) -> None:
        self._rendezvous = rendezvous
        self._allocation = allocation
        self._folder = folder
        self._seconds = seconds
        self._hosts: list[HostInfo] = []

    def examine(self, host_info: HostInfo) -> DoctorReport:
        """Lead all agents through the checks, and return the report."""
        rows = self._gather_hosts(host_info)
        if not any(row.problem for row in rows):
            rows += self._compare_hosts()
            self._rendezvous.set("begin", True)
            rows += [self._check_shared_folder(), self._compare_clocks(), *self._measure_collectives()]
        problem = next((row.problem for row in rows if row.problem), None)
        others = range(1, len(self._hosts))
        self._rendezvous.set("verdict", True)
        # The store lives in this process: stay until the others have read what they wait for.
        self._rendezvous.wait_all([f"goodbye/{number}" for number in others], min(_GOODBYE_SECONDS, self._seconds))
        return DoctorReport(_format_table(rows), problem)

    def _gather_hosts(self, host_info: HostInfo) -> list[_Row]:
        """Wait for the other agents."""
        expected = self._allocation.hosts
        keys = [f"facts/{number}" for number in range(1, len(expected))]
        began = time.monotonic()
        self._rendezvous.wait_all(keys, self._seconds)
        elapsed = time.monotonic() - began
        answers = [self._rendezvous.get(key) for key in keys]
        self._hosts = [host_info, *(HostInfo(**facts) for facts in answers if facts is not None)]
        present = [host.name for host in self._hosts]
        result = f"{len(present)} of {len(expected)}: {format_names(present)}"
        if self._allocation.scheduler:
            result += f"; {self._allocation.scheduler} {self._allocation.job}"
        repeated = [name for name, names in group_hosts([(name, name) for name in present]).items() if len(names) > 1]
        if repeated:
            problem = f"{format_names(repeated)} has two agents: start one on each host (mpiexec: one process per host)"
            return [_Row("hosts", result, problem)]
        address = f"{self._rendezvous.address}:{self._rendezvous.port}"
        if len(present) < len(expected):
            missing = [name for name in expected if host_index(name, present) is None]
            problem = (
                f"{format_names(missing)} did not come to {address} within {self._seconds:.0f} s: "
                "check that it is up and that the launcher starts an agent there, and read its messages"
            )
            return [_Row("hosts", result, problem)]
        return [_Row("hosts", result), _Row("rendezvous", f"{address}; all were there after {elapsed:.1f} s")]

    def _compare_hosts(self) -> list[_Row]:
        hosts = self._hosts
        first = hosts[0]
        versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
        devices = f"{first.num_devices} x {first.device}" if first.num_devices else "no accelerators"
        return [
            _Row("versions", versions, version_mismatch(hosts)),
            _Row("devices", f"{devices}, {first.num_processes} processes per host", device_problem(hosts)),
            _Row("work folder", first.folder, folder_mismatch(hosts)),
        ]

    def _check_shared_folder(self) -> _Row:
        """Write a file that all hosts should see, and read the files of the others."""
        token = secrets.token_hex(8)
        others = range(1, len(self._hosts))
        first_name = self._hosts[0].name
        marker = _marker(self._folder, token, 0)
        try:
            marker.write_text(token)
        except OSError as error:
            self._rendezvous.set("folder", "")
            problem = f"{self._folder} cannot be written to on {first_name} ({error.strerror}): choose another one"
            return _Row("shared folder", str(self._folder), problem)
        try:
            self._rendezvous.set("folder", token)
            wait_seconds = _file_wait_seconds(self._seconds)
            late = self._rendezvous.wait_all([f"sees/{number}" for number in others], 2 * wait_seconds)
            blind: list[str] = []
            unseen: list[str] = []
            for number in others:
                name = self._hosts[number].name
                if f"sees/{number}" in late or not self._rendezvous.get(f"sees/{number}"):
                    blind.append(name)
                elif not _sees(_marker(self._folder, token, number), token, wait_seconds):
                    unseen.append(name)
        finally:
            marker.unlink(missing_ok=True)
            self._rendezvous.set("folder is done", True)
        if blind or unseen:
            problem = (
                f"{format_names(blind or unseen)} does not share {self._folder} with {first_name}: "
                "use a folder on a filesystem that all hosts mount"
            )
            return _Row("shared folder", str(self._folder), problem)
        return _Row("shared folder", f"{self._folder}, seen by all" if others else str(self._folder))

    def _compare_clocks(self) -> _Row:
        """Ask each other host for its time several times; the fastest answer counts."""
        worst = 0.0
        worst_name = ""
        for number in range(1, len(self._hosts)):
            name = self._hosts[number].name
            offsets: list[tuple[float, float]] = []  # round trip, offset
            for turn in range(_NUM_CLOCK_ROUNDS):
                sent = time.time()
                self._rendezvous.set(f"ask/{number}/{turn}", True)
                answer = self._rendezvous.wait_text(f"time/{number}/{turn}", self._seconds)
                round_trip = time.time() - sent
                if answer is None:
                    problem = f"{name} did not send its time within {self._seconds:.0f} s: read its agent's messages"
                    return _Row("clock", "no answer", problem)
                offsets.append((round_trip, float(answer) - sent - round_trip / 2))
            offset = min(offsets)[1]
            if abs(offset) > abs(worst):
                worst = offset
                worst_name = name
        if abs(worst) > _MAX_CLOCK_DIFFERENCE_SECONDS:
            relation = "ahead of" if worst > 0 else "behind"
            problem = (
                f"{worst_name}'s clock is {abs(worst):.0f} s {relation} {self._hosts[0].name}'s: set both by one time "
                "server"
            )
            return _Row("clock", f"{abs(worst):.1f} s apart", problem)
        return _Row("clock", f"at most {abs(worst) * 1e3:.1f} ms apart" if worst_name else "one")

    def _measure_collectives(self) -> list[_Row]:
        """Let all hosts start their processes, and read what these measured."""
        hosts = self._hosts
        if device_problem(hosts) is not None:
            self._rendezvous.set("plan", {})
            return []
        nproc = hosts[0].num_processes
        plan = GroupPlan(
            address=self._rendezvous.address,
            port=self._rendezvous.port,
            first_ranks=tuple(nproc * number for number in range(len(hosts))),
            size=nproc * len(hosts),
            device=hosts[0].device,
            seconds=self._seconds,
        )
        self._rendezvous.set("plan", asdict(plan))
        began = time.monotonic()
        run_processes(self._rendezvous, plan, range(nproc))
        keys = {f"ended/{number}": hosts[number].name for number in range(1, len(hosts))}
        late = [keys[key] for key in self._rendezvous.wait_all(keys, 2 * self._seconds)]
        elapsed = time.monotonic() - began
        device = self._rendezvous.get("device") or hosts[0].device
        result = f"{plan.size} x {device}, {plan.backend}, {elapsed:.1f} s in all"
        failure = self._rendezvous.get("failed/0")
        if failure is not None:
            return [_Row("processes", result, format_failure(failure, plan))]
        if late:
            problem = f"{format_names(late)} did not end its processes within {2 * self._seconds:.0f} s"
            return [_Row("processes", result, problem)]
        return [_Row("processes", result), *self._speeds(plan)]

    def _speeds(self, plan: GroupPlan) -> list[_Row]:
        if plan.size == 1:
            return [_Row("all-reduce", "one process: nothing to reduce")]
        speed = AllReduceSpeed(*self._rendezvous.get("speed/all"))
        rows = [_Row("all-reduce", f"{speed.size} processes: {speed}")]
        between = self._rendezvous.get("speed/hosts")
        if between is not None:
            speed = AllReduceSpeed(*between)
            rows.append(_Row("between hosts", f"{speed.size} hosts, one process each: {speed}"))
        return rows


class _Follower:
    """The agent on any other host."""

    def __init__(self, rendezvous: Rendezvous, host_info: HostInfo, number: int, folder: Path, seconds: float) -> None:
        self._rendezvous = rendezvous
        self._host_info = host_info
        self._number = number
        self._folder = folder
        self._seconds = seconds
        self._patience_seconds = _STEPS_WITHOUT_ANSWER * seconds

    def examine(self) -> DoctorReport:
        """Follow the first host through the checks; the report is empty."""
        self._rendezvous.set(f"facts/{self._number}", self._host_info.to_json())
        if self._wait_for("begin", "begin"):
            self._check_shared_folder()
            self._send_times()
            self._measure_collectives()
        self._wait_for("verdict", "end")
        self._rendezvous.set(f"goodbye/{self._number}", True)
        return DoctorReport()

    def _wait_for(self, key: str, action: str) -> Any:
        """The first host's value of a key; None if it has ended the checks instead."""
        if not self._rendezvous.wait_any([key, "verdict"], self._patience_seconds):
            raise UserError(
                f"{self._host_info.name} waited {self._patience_seconds:.0f} s for the first host to {action}: read "
                "its messages"
            )
        return self._rendezvous.get(key)

    def _check_shared_folder(self) -> None:
        token = self._wait_for("folder", "write a file")
        if not token:
            return
        marker = _marker(self._folder, token, self._number)
        try:
            with suppress(OSError):  # the first host then misses the file, and reports it
                marker.write_text(token)
            sees_first = _sees(_marker(self._folder, token, 0), token, _file_wait_seconds(self._seconds))
            self._rendezvous.set(f"sees/{self._number}", sees_first)
            self._wait_for("folder is done", "find this host's file")
        finally:
            with suppress(OSError):
                marker.unlink()

    def _send_times(self) -> None:
        for turn in range(_NUM_CLOCK_ROUNDS):
            if self._rendezvous.wait_text(f"ask/{self._number}/{turn}", self._patience_seconds) is None:
                break
            self._rendezvous.set(f"time/{self._number}/{turn}", time.time())

    def _measure_collectives(self) -> None:
        fields = self._wait_for("plan", "start the processes")
        if not fields:
            return
        first_ranks = tuple(fields.pop("first_ranks"))
        plan = GroupPlan(first_ranks=first_ranks, **fields)
        first_rank = first_ranks[self._number]
        run_processes(self._rendezvous, plan, range(first_rank, first_rank + self._host_info.num_processes))
        self._rendezvous.set(f"ended/{self._number}", True)


def _file_wait_seconds(seconds: float) -> float:
    return min(seconds, _MAX_FILE_WAIT_SECONDS)


def _marker(folder: Path, token: str, number: int) -> Path:
    """The file that one host writes for the others to see."""
    return folder / f".doctor-{token}-{number}"


def _sees(path: Path, token: str, seconds: float) -> bool:
    """Whether the file appears within this time."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if path.read_text() == token:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)


def _format_table(rows: Sequence[_Row]) -> list[str]:
    width = max(len(row.name) for row in rows)
    return [
        f"{row.name.ljust(width)}  {'FIX ' if row.problem else 'ok  '}  {row.problem or row.result}" for row in rows
    ]
