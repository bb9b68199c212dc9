"""The job allocation, read from the variables of PBS, Slurm and MPIs."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from llm.clusters.allocation import (
    JobAllocation,
    ProcessLauncher,
    check_one_agent_per_host,
    find_allocation,
    job_number,
)
from llm.config.errors import UserError


def test_allocation_when_there_are_no_variables_then_is_this_host_alone() -> None:
    allocation = find_allocation({})
    assert allocation == JobAllocation((socket.gethostname(),), rank=0)
    check_one_agent_per_host(allocation)


def test_allocation_when_pbs_repeats_hosts_then_each_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("n1.x\nn1.x\nn2.x\nn2.x\n")
    allocation = find_allocation({"PBS_JOBID": "123.server", "PBS_NODEFILE": str(tmp_path / "nodes")})
    assert allocation.hosts == ("n1.x", "n2.x")
    assert (allocation.scheduler, allocation.job, allocation.port) == ("pbs", "123.server", 20123)


def test_allocation_when_the_node_file_cannot_be_read_then_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"PBS_NODEFILE .*missing: cannot be read"):
        find_allocation({"PBS_NODEFILE": str(tmp_path / "missing")})
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="holds no hosts"):
        find_allocation({"PBS_NODEFILE": str(tmp_path / "empty")})


def test_allocation_when_slurm_emulates_pbs_then_is_a_pbs_job(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("n1\nn2\n")
    both = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "m[1-2]", "PBS_NODEFILE": str(tmp_path / "nodes")}
    allocation = find_allocation(both)
    assert (allocation.scheduler, allocation.job, allocation.hosts) == ("pbs", "7", ("n1", "n2"))


def test_allocation_when_a_step_has_fewer_hosts_then_only_an_agent_uses_its_list() -> None:
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_STEP_NODELIST": "n[1-2]"}
    assert find_allocation(variables).hosts == ("n1", "n2")
    assert len(find_allocation(variables, is_step=False).hosts) == 4


def test_allocation_when_the_command_line_names_hosts_then_these_are_used(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("# two\na slots=4\nb:8\n")
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]"}
    assert find_allocation(variables, hosts="a, b").hosts == ("a", "b")
    assert find_allocation(variables, hostfile=str(tmp_path / "mine")).hosts == ("a", "b")
    with pytest.raises(UserError, match="give one of them"):
        find_allocation({}, hosts="a", hostfile="b")
    with pytest.raises(UserError, match="must be names of hosts"):
        find_allocation({}, hosts="a,,b")


@pytest.mark.parametrize(
    ("host", "is_remote"),
    [
        ("localhost", False),
        ("127.0.0.1", False),
        (socket.gethostname(), False),
        ("192.0.2.1", True),
        ("n.invalid", True),
    ],
)
def test_allocation_when_one_host_is_named_then_is_remote_unless_it_is_this_host(host: str, *, is_remote: bool) -> None:
    assert find_allocation({}, hosts=host).is_remote == is_remote
    # A scheduler may know this host by a name that the host itself cannot resolve.
    assert not JobAllocation((host,), "pbs", "7", rank=0).is_remote


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "1"},
        {"PMI_RANK": "1", "PMI_SIZE": "2", "PALS_RANKID": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
    ],
    ids=["Open MPI", "hydra", "PALS", "srun"],
)
def test_rank_when_the_name_is_not_in_the_list_then_is_the_launchers(variables: dict[str, str]) -> None:
    allocation = find_allocation(variables, hosts="a,b")
    assert allocation.rank == 1
    check_one_agent_per_host(allocation)


def test_rank_when_the_name_is_in_the_list_then_is_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "b.login")
    assert find_allocation({"PMI_RANK": "0", "PMI_SIZE": "2"}, hosts="a.fast,b.fast").rank == 1


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        (JobAllocation(("a", "b"), "pbs"), "2 hosts, and `launch node` runs on this one alone"),
        (
            JobAllocation(("a", "b"), "pbs", launcher=ProcessLauncher(0, 8, 4)),
            "8 agents were started, 4 here, for 2 hosts",
        ),
        (
            JobAllocation(("a", "b"), "pbs", launcher=ProcessLauncher(0, 2, 2)),
            "2 agents were started, 2 here, for 2 hosts",
        ),
        (
            JobAllocation(("a",), "pbs", launcher=ProcessLauncher(0, 4, 4)),
            "4 agents were started, 4 here, for 1 host:",
        ),
        (JobAllocation(("here",), launcher=ProcessLauncher(0, 4, 1)), "their hosts are unknown; give --hosts"),
    ],
)
def test_agents_when_not_one_per_host_then_are_refused(allocation: JobAllocation, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_one_agent_per_host(allocation)


@pytest.mark.parametrize(
    ("job", "number"),
    [("123.polaris-pbs-01.hsn", 123), ("123[4].server", 127), ("7", 7), ("none", 0), ("20001.x", 20001)],
)
def test_port_when_the_job_has_a_number_then_depends_on_it(job: str, number: int) -> None:
    assert job_number(job) == number
    assert JobAllocation(("a",), job=job).port == 20000 + number % 20000
