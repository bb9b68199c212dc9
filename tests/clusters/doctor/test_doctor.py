"""The doctor on one machine and on two hosts, healthy and not."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clusters.hosts import ROOT, Hosts, clone

on_hosts = pytest.mark.clusters
slow = pytest.mark.slow


@dataclass(frozen=True)
class Visit:
    """What a doctor's agent said."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> dict[str, str]:
        """The table: name -> state and words."""
        cut = [line.partition("  ") for line in self.out.splitlines() if "  " in line]
        return {name: rest.strip() for name, _, rest in cut}

    @property
    def to_mend(self) -> list[str]:
        return [name for name, said in self.rows.items() if said.startswith("MEND")]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return clone(tmp_path / "clone")


def visit_each(
    hosts: Hosts,
    work: Path,
    environments: Mapping[str, Mapping[str, str]],
    *words: str,
    seconds: int = 60,
    before: str = "true",
) -> dict[str, Visit]:
    """Starts the agents of some hosts by hand, each in an environment of its own; `before` runs on n2 only."""
    agent = ["python", "-m", "llm.launch", "doctor", "--inside", "--hosts", ",".join(hosts.names), "--job", "7"]
    started = {}
    for name, more in environments.items():
        shell = f'{before if name == "n2" else "true"}; cd "$0"; exec "$@"'
        started[name] = subprocess.Popen(
            hosts.command(name, ["sh", "-c", shell, work, *agent, "--seconds", str(seconds), *words], work),
            env=hosts.environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    said = {name: process.communicate(timeout=150) for name, process in started.items()}
    return {name: Visit(started[name].returncode, *said[name]) for name in started}


@slow
def test_doctor_when_on_one_machine_then_two_processes_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llm.launch", "doctor", "--nproc", "2", "--use_cpu", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    visit = Visit(done.returncode, done.stdout, done.stderr)
    assert visit.code == 0, visit
    assert visit.to_mend == []
    assert "2 x cpu, gloo" in visit.rows["processes"]
    assert "2 processes: " in visit.rows["all-reduce"]
    assert "GB/s for 16 MiB" in visit.rows["all-reduce"]
    assert list(tmp_path.iterdir()) == []


@slow
@on_hosts
def test_doctor_when_started_once_in_a_job_then_examines_both_hosts(two_hosts: Hosts, work: Path) -> None:
    nodes = work / "nodes"
    nodes.write_text("n1\nn1\nn2\nn2\n")
    environment = two_hosts.environment(PBS_NODEFILE=str(nodes), PBS_JOBID="5.server", PBS_O_WORKDIR=str(work))
    environment["PATH"] = f"{two_hosts.folder}/mpich:{environment['PATH']}"
    done = two_hosts.run(
        "n1", "python", "-m", "llm.launch", "doctor", "--nproc", "2", folder=work, environment=environment
    )
    visit = Visit(done.returncode, done.stdout, done.stderr)
    assert visit.code == 0, visit
    assert visit.to_mend == []
    assert "2 of 2: n1, n2; pbs 5.server" in visit.rows["hosts"]
    assert "n1:20005" in visit.rows["rendezvous"]
    assert "seen by all" in visit.rows["shared folder"]
    assert "4 processes: " in visit.rows["all-reduce"]
    assert "2 hosts, one process each: " in visit.rows["between hosts"]
    assert not list(work.glob(".doctor*"))


WRONG = ("versions", "shared folder", "clock")


@slow
@on_hosts
@pytest.mark.parametrize("wrong", [WRONG, *(pytest.param((one,), marks=pytest.mark.exhaustive) for one in WRONG)])
def test_doctor_when_a_host_is_not_as_the_others_then_says_so_and_ends_with_one(
    two_hosts: Hosts, work: Path, tmp_path: Path, wrong: tuple[str, ...]
) -> None:
    other = tmp_path / "other"  # on n2's path of modules alone
    package = other / "transformers-4.0.0.dist-info"
    package.mkdir(parents=True)
    if "versions" in wrong:
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    else:
        package.rmdir()
    if "clock" in wrong:
        (other / "sitecustomize.py").write_text(
            "import time\ntrue_time = time.time\ntime.time = lambda: true_time() + 100\n"
        )
    shared = work / "shared"
    shared.mkdir()
    hide = f"mount -t tmpfs none '{shared}'" if "shared folder" in wrong else "true"
    environments = {"n1": {}, "n2": {"PYTHONPATH": str(other)}}
    try:
        visits = visit_each(two_hosts, work, environments, "--folder", str(shared), before=hide)
    finally:
        two_hosts.run("n2", "umount", shared)
    said = {
        "versions": "transformers is ",
        "shared folder": f"n2 does not share {shared} with n1: ",
        "clock": "n2's clock is 100 s ahead of n1's: ",
    }
    assert visits["n1"].to_mend == list(wrong), visits
    assert all(said[name] in visits["n1"].rows[name] for name in wrong)
    assert "2 processes: " in visits["n1"].rows["all-reduce"]
    assert visits["n1"].err.splitlines()[-1].startswith(f"error: {said[wrong[0]]}")
    assert (visits["n1"].code, visits["n2"].code, visits["n2"].out) == (1, 0, "")


@slow
@on_hosts
def test_doctor_when_a_host_does_not_come_then_each_says_whom_it_waited_for(two_hosts: Hosts, work: Path) -> None:
    first = visit_each(two_hosts, work, {"n1": {}}, seconds=3)["n1"]
    assert first.code == 1
    assert first.err.splitlines()[-1].startswith("error: n2 did not come to n1:20007 within 3 s: ")
    other = visit_each(two_hosts, work, {"n2": {}}, seconds=3)["n2"]
    assert other.code == 1
    assert other.err.splitlines()[-1].startswith("error: n2 waited 3 s for n1:20007 ")


@slow
@on_hosts
@pytest.mark.exhaustive
def test_doctor_when_the_network_is_the_wrong_one_then_names_its_variable(two_hosts: Hosts, work: Path) -> None:
    visit = visit_each(two_hosts, work, {"n1": {}, "n2": {}}, "--interface", "lo", seconds=15)["n1"]
    assert (visit.code, visit.to_mend) == (1, ["processes"]), visit
    assert "see that GLOO_SOCKET_IFNAME (--interface) names a network" in visit.err


@slow
@on_hosts
@pytest.mark.exhaustive
def test_doctor_when_a_process_hangs_then_ends_in_time_and_names_it(
    two_hosts: Hosts, work: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\nif '--multiprocessing-fork' in sys.orig_argv:\n    time.sleep(1000)\n"
    )
    began = time.monotonic()
    visit = visit_each(two_hosts, work, {"n1": {}, "n2": {"PYTHONPATH": str(tmp_path)}}, seconds=15)["n1"]
    assert time.monotonic() - began < 100
    assert (visit.code, visit.to_mend) == (1, ["processes"]), visit
    assert "on n2 waited 15 s for the libraries to load" in visit.err
