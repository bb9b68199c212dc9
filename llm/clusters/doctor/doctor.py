"""Examines an allocation before a run does: one agent on each host, which together say what is wrong first.

The agents meet at a store on the first host, which leads through the steps; the others answer. Every step has a
deadline, so that whatever is broken, each agent ends and says what it waited for.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm.clusters.allocation import JobAllocation
from llm.clusters.doctor.collective_checks import Plan, Speed, run_processes
from llm.clusters.doctor.host_info import (
    HostInfo,
    collect_host_info,
    device_mistake,
    folder_mistake,
    group,
    short,
    version_mistake,
)
from llm.clusters.doctor.rendezvous import Rendezvous, is_here
from llm.clusters.hostlist import index_of
from llm.config.errors import UserError
from llm.config.launch import DoctorOptions

# A walltime is kept to by the clock of the host that asks, and files are compared by their ages.
_MOST_CLOCK_SECONDS = 5.0
_NUM_CLOCK_ROUNDS = 4
# Nobody has asked for the file before it is there, so that no network filesystem remembers that it is not.
_LONGEST_LOOK_SECONDS = 10.0
_GOODBYE_SECONDS = 5.0
# The first host may use up its time in several steps before it speaks to the others again.
_STEPS_OF_PATIENCE = 4


@dataclass
class Examination:
    """What the doctor says, on the first host; the others have nothing to say.

    Attributes:
        lines: the table.
        problem: the first thing to mend, or None.
    """

    lines: list[str] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class _Row:
    name: str
    said: str
    mistake: str | None = None


def examine(place: JobAllocation, options: DoctorOptions, *, nproc: int) -> Examination:
    """Examines the hosts together with the agents on the others.

    Args:
        place: the hosts.
        options: for the folder, the port, and how long each step may take.
        nproc: processes on each host.

    Raises:
        UserError: this agent cannot reach the first one, or lost it, or is one too many.
    """
    first, folder, seconds = place.hosts[0], Path(options.folder).expanduser(), options.seconds
    is_first = place.rank == 0 if place.rank is not None else is_here(first)
    own = collect_host_info(nproc, use_cpu=options.use_cpu)
    if len(place.hosts) == 1 and place.job is None and options.port is None:
        address, port = "localhost", 0  # any free one
    else:
        address, port = first, options.port or place.port
    meeting = Rendezvous(address, port, is_first=is_first, seconds=seconds)
    if is_first:
        return _Lead(meeting, place, folder, seconds).examine(own)
    number = meeting.count("arrived") + 1
    if number >= len(place.hosts):
        raise UserError(f"{own.name} has an agent too many: start one on each host (mpiexec: one process a host)")
    return _follow(meeting, own, number, folder, seconds)


class _Lead:
    """The first host's part."""

    def __init__(self, meeting: Rendezvous, place: JobAllocation, folder: Path, seconds: float) -> None:
        self._meeting, self._place, self._folder, self._seconds = meeting, place, folder, seconds
        self._hosts: list[HostInfo] = []

    def examine(self, own: HostInfo) -> Examination:
        rows = self._gather(own)
        if not any(row.mistake for row in rows):
            rows += self._compare()
            self._meeting.say("begin", True)
            rows += [self._share_a_folder(), self._compare_clocks(), *self._measure()]
        problem = next((row.mistake for row in rows if row.mistake), None)
        others = range(1, len(self._hosts))
        self._meeting.say("verdict", True)
        # The store lives in this process: it stays until all have read what they wait for.
        self._meeting.await_all([f"goodbye/{number}" for number in others], min(_GOODBYE_SECONDS, self._seconds))
        return Examination(_table(rows), problem)

    def _gather(self, own: HostInfo) -> list[_Row]:
        """Waits for the other agents."""
        names = self._place.hosts
        began = time.monotonic()
        self._meeting.await_all([f"facts/{number}" for number in range(1, len(names))], self._seconds)
        took = time.monotonic() - began
        found = [self._meeting.heard(f"facts/{number}") for number in range(1, len(names))]
        self._hosts = [own, *(HostInfo(**facts) for facts in found if facts is not None)]
        came = [host.name for host in self._hosts]
        said = f"{len(came)} of {len(names)}: {short(came)}"
        said += f"; {self._place.scheduler} {self._place.job}" if self._place.scheduler else ""
        twice = [name for name, again in group([(name, name) for name in came]).items() if len(again) > 1]
        if twice:
            mistake = f"{short(twice)} has two agents: start one on each host (mpiexec: one process a host)"
            return [_Row("hosts", said, mistake)]
        place = f"{self._meeting.address}:{self._meeting.port}"
        if len(came) < len(names):
            missing = [name for name in names if index_of(name, came) is None]
            mistake = f"{short(missing)} did not come to {place} within {self._seconds:.0f} s"
            mend = "see whether it is up, whether the launcher starts an agent there, and what that one says"
            return [_Row("hosts", said, f"{mistake}: {mend}")]
        return [_Row("hosts", said), _Row("rendezvous", f"{place}; all were there after {took:.1f} s")]

    def _compare(self) -> list[_Row]:
        hosts = self._hosts
        first = hosts[0]
        versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
        kind = f"{first.num_devices} x {first.device}" if first.num_devices else "no accelerators"
        return [
            _Row("versions", versions, version_mistake(hosts)),
            _Row("devices", f"{kind}, {first.num_processes} processes a host", device_mistake(hosts)),
            _Row("work folder", first.folder, folder_mistake(hosts)),
        ]

    def _share_a_folder(self) -> _Row:
        """Puts a file where all should see it, and looks for theirs."""
        token = secrets.token_hex(8)
        others = range(1, len(self._hosts))
        own = _mark(self._folder, token, 0)
        said = f"{self._folder}"
        try:
            own.write_text(token)
        except OSError as error:
            mistake = f"{self._folder} cannot be written to on {self._hosts[0].name} ({error.strerror}): choose another"
            self._meeting.say("folder", "")
            return _Row("shared folder", said, mistake)
        try:
            self._meeting.say("folder", token)
            patience = _look_seconds(self._seconds)
            late = self._meeting.await_all([f"sees/{number}" for number in others], 2 * patience)
            blind = [self._hosts[n].name for n in others if f"sees/{n}" in late or not self._meeting.heard(f"sees/{n}")]
            unseen = [
                self._hosts[n].name
                for n in others
                if self._hosts[n].name not in blind and not _sees(_mark(self._folder, token, n), token, patience)
            ]
        finally:
            own.unlink(missing_ok=True)
            self._meeting.say("folder is done", True)
        if blind or unseen:
            mistake = f"{short(blind or unseen)} does not share {self._folder} with {self._hosts[0].name}: "
            return _Row("shared folder", said, mistake + "use a folder on a filesystem that all hosts mount")
        return _Row("shared folder", f"{said}, seen by all" if others else said)

    def _compare_clocks(self) -> _Row:
        """Asks the others for the time, several times; the quickest answer counts."""
        worst, worst_name = 0.0, ""
        for number in range(1, len(self._hosts)):
            offsets: list[tuple[float, float]] = []
            for turn in range(_NUM_CLOCK_ROUNDS):
                asked = time.time()
                self._meeting.say(f"ask/{number}/{turn}", True)
                answer = self._meeting.answer(f"time/{number}/{turn}", self._seconds)
                trip = time.time() - asked
                if answer is None:
                    mistake = f"{self._hosts[number].name} did not say its time within {self._seconds:.0f} s"
                    return _Row("clock", "no answer", f"{mistake}: see what its agent says")
                offsets.append((trip, float(answer) - asked - trip / 2))
            offset = min(offsets)[1]
            if abs(offset) > abs(worst):
                worst, worst_name = offset, self._hosts[number].name
        if abs(worst) > _MOST_CLOCK_SECONDS:
            way = "ahead of" if worst > 0 else "behind"
            mistake = (
                f"{worst_name}'s clock is {abs(worst):.0f} s {way} {self._hosts[0].name}'s: set both by one time server"
            )
            return _Row("clock", f"{abs(worst):.1f} s apart", mistake)
        return _Row("clock", f"{abs(worst) * 1e3:.1f} ms apart at most" if worst_name else "one")

    def _measure(self) -> list[_Row]:
        """Lets all hosts start their processes, and reads what these found out."""
        hosts = self._hosts
        if device_mistake(hosts) is not None:
            self._meeting.say("plan", {})
            return []
        each = hosts[0].num_processes
        ranks = tuple(each * number for number in range(len(hosts)))
        plan = Plan(self._meeting.address, self._meeting.port, ranks, each * len(hosts), hosts[0].device, self._seconds)
        self._meeting.say("plan", plan.__dict__)
        began = time.monotonic()
        run_processes(self._meeting, plan, range(each))
        left = self._meeting.await_all([f"ended/{number}" for number in range(1, len(hosts))], 2 * self._seconds)
        took = time.monotonic() - began
        device = self._meeting.heard("device") or hosts[0].device
        said = f"{plan.size} x {device}, {plan.backend}, {took:.1f} s in all"
        failed = self._meeting.heard("failed/0")
        if failed is not None:
            return [_Row("processes", said, _failure(failed, plan))]
        if left:
            names = [hosts[int(key.split("/")[1])].name for key in left]
            return [
                _Row("processes", said, f"{short(names)} did not end its processes within {2 * self._seconds:.0f} s")
            ]
        return [_Row("processes", said), *self._speeds(plan)]

    def _speeds(self, plan: Plan) -> list[_Row]:
        rows = []
        if plan.size == 1:
            return [_Row("all-reduce", "one process: nothing to agree on")]
        speed = Speed(*self._meeting.heard("speed/all"))
        rows.append(_Row("all-reduce", f"{speed.size} processes: {speed}"))
        between = self._meeting.heard("speed/hosts")
        if between is not None:
            rows.append(_Row("between hosts", f"{between[0]} hosts, one process each: {Speed(*between)}"))
        return rows


def _failure(failed: dict[str, Any], plan: Plan) -> str:
    """What went wrong in a process, with a mend for its stage."""
    where = f"rank {failed['rank']} on {failed['host']}"
    if failed["stage"] == "start":
        return f"{where} {failed['problem']}: see its messages above; --seconds gives slow disks more time"
    prefix = {"gloo": "GLOO", "nccl": "NCCL", "xccl": "CCL"}.get(plan.backend, plan.backend.upper())
    mend = f"see that {prefix}_SOCKET_IFNAME (--interface) names a network that all hosts are on, without a firewall"
    if len(plan.first_ranks) == 1:
        mend = "see the devices and the driver of this host"
    return f"{where} in {failed['stage']}: {failed['problem']}: {mend}"


def _follow(meeting: Rendezvous, own: HostInfo, number: int, folder: Path, seconds: float) -> Examination:
    """The part of every other host."""
    patience = _STEPS_OF_PATIENCE * seconds
    meeting.say(f"facts/{number}", own.to_json())

    def hear(key: str, what: str) -> Any:
        """What the first host says; None when it says that it is over instead."""
        if not meeting.await_any([key, "verdict"], patience):
            raise UserError(f"{own.name} waited {patience:.0f} s for the first host to {what}: see what it said")
        return meeting.heard(key)

    if hear("begin", "begin"):
        token = hear("folder", "write a file")
        if token:
            _answer_folder(meeting, folder, token, number, seconds, hear)
        for turn in range(_NUM_CLOCK_ROUNDS):
            if meeting.answer(f"ask/{number}/{turn}", patience) is None:
                break
            meeting.say(f"time/{number}/{turn}", time.time())
        plan = hear("plan", "start the processes")
        if plan:
            first_ranks = tuple(plan.pop("first_ranks"))
            begin = first_ranks[number]
            run_processes(meeting, Plan(first_ranks=first_ranks, **plan), range(begin, begin + own.num_processes))
            meeting.say(f"ended/{number}", True)
    hear("verdict", "end")
    meeting.say(f"goodbye/{number}", True)
    return Examination()


def _answer_folder(
    meeting: Rendezvous, folder: Path, token: str, number: int, seconds: float, hear: Callable[[str, str], Any]
) -> None:
    own = _mark(folder, token, number)
    try:
        with suppress(OSError):  # then the first host does not find it, and says so
            own.write_text(token)
        meeting.say(f"sees/{number}", _sees(_mark(folder, token, 0), token, _look_seconds(seconds)))
        hear("folder is done", "find this host's file")
    finally:
        with suppress(OSError):
            own.unlink()


def _look_seconds(seconds: float) -> float:
    return min(seconds, _LONGEST_LOOK_SECONDS)


def _mark(folder: Path, token: str, number: int) -> Path:
    return folder / f".doctor-{token}-{number}"


def _sees(path: Path, token: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if path.read_text() == token:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)


def _table(rows: Sequence[_Row]) -> list[str]:
    width = max(len(row.name) for row in rows)
    return [f"{row.name.ljust(width)}  {'MEND' if row.mistake else 'ok  '}  {row.mistake or row.said}" for row in rows]
