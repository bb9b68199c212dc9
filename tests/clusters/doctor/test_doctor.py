"""The doctor on one machine and on two hosts, with and without faults."""

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
class Outcome:
    """Exit code and output of a doctor's agent."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> dict[str, str]:
        """The table: name of the check -> state and result."""
        cells = [line.partition("  ") for line in self.out.splitlines() if "  " in line]
        return {name: rest.strip() for name, _, rest in cells}

    @property
    def problems(self) -> list[str]:
        return [name for name, text in self.rows.items() if text.startswith("FIX")]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return clone(tmp_path / "clone")


def examine_each(
    hosts: Hosts,
    work: Path,
    environments: Mapping[str, Mapping[str, str]],
    *words: str,
    seconds: int = 60,
    before: str = "true",
) -> dict[str, Outcome]:
    """Start the agents of some hosts by hand, each with its own variables; `before` runs on n2 only."""
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
    outputs = {name: process.communicate(timeout=150) for name, process in started.items()}
    return {name: Outcome(started[name].returncode, *outputs[name]) for name in started}


@slow
def test_doctor_when_on_one_machine_then_two_processes_reduce(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llm.launch", "doctor", "--nproc", "2", "--use_cpu", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert outcome.code == 0, outcome
    assert outcome.problems == []
    assert "2 x cpu, gloo" in outcome.rows["processes"]
    assert "2 processes: " in outcome.rows["all-reduce"]
    assert "GB/s for 16 MiB" in outcome.rows["all-reduce"]
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
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert outcome.code == 0, outcome
    assert outcome.problems == []
    assert "2 of 2: n1, n2; pbs 5.server" in outcome.rows["hosts"]
    assert "n1:20005" in outcome.rows["rendezvous"]
    assert "seen by all" in outcome.rows["shared folder"]
    assert "4 processes: " in outcome.rows["all-reduce"]
    assert "2 hosts, one process each: " in outcome.rows["between hosts"]
    assert not list(work.glob(".doctor*"))


WRONG = ("versions", "shared folder", "clock")


@slow
@on_hosts
@pytest.mark.parametrize("wrong", [WRONG, *(pytest.param((one,), marks=pytest.mark.exhaustive) for one in WRONG)])
def test_doctor_when_a_host_differs_then_names_it_and_ends_with_one(
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
        outcomes = examine_each(two_hosts, work, environments, "--folder", str(shared), before=hide)
    finally:
        two_hosts.run("n2", "umount", shared)
    messages = {
        "versions": "transformers is ",
        "shared folder": f"n2 does not share {shared} with n1: ",
        "clock": "n2's clock is 100 s ahead of n1's: ",
    }
    assert outcomes["n1"].problems == list(wrong), outcomes
    assert all(messages[name] in outcomes["n1"].rows[name] for name in wrong)
    assert "2 processes: " in outcomes["n1"].rows["all-reduce"]
    assert outcomes["n1"].err.splitlines()[-1].startswith(f"error: {messages[wrong[0]]}")
    assert (outcomes["n1"].code, outcomes["n2"].code, outcomes["n2"].out) == (1, 0, "")


@slow
@on_hosts
def test_doctor_when_a_host_does_not_come_then_each_agent_names_the_missing_one(two_hosts: Hosts, work: Path) -> None:
    first = examine_each(two_hosts, work, {"n1": {}}, seconds=3)["n1"]
    assert first.code == 1
    assert first.err.splitlines()[-1].startswith("error: n2 did not come to n1:20007 within 3 s: ")
    other = examine_each(two_hosts, work, {"n2": {}}, seconds=3)["n2"]
    assert other.code == 1
    assert other.err.splitlines()[-1].startswith("error: n2 waited 3 s for n1:20007 ")


@slow
@on_hosts
@pytest.mark.exhaustive
def test_doctor_when_the_network_is_wrong_then_names_its_variable(two_hosts: Hosts, work: Path) -> None:
    outcome = examine_each(two_hosts, work, {"n1": {}, "n2": {}}, "--interface", "lo", seconds=15)["n1"]
    assert (outcome.code, outcome.problems) == (1, ["processes"]), outcome
    assert "check that GLOO_SOCKET_IFNAME (--interface) names a network" in outcome.err


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
    outcome = examine_each(two_hosts, work, {"n1": {}, "n2": {"PYTHONPATH": str(tmp_path)}}, seconds=15)["n1"]
    assert time.monotonic() - began < 100
    assert (outcome.code, outcome.problems) == (1, ["processes"]), outcome
    assert "on n2 waited 15 s for the libraries to load" in outcome.err
