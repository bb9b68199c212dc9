"""The agent of a host."""

from __future__ import annotations

import signal
import socket
import sys
from typing import Literal
from unittest.mock import Mock

import pytest
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

import llm.clusters.torchrun_agent as agents
from llm.clusters.allocation import JobAllocation
from llm.clusters.torchrun_agent import agent_command, agent_environment, check_meeting, mistake_file, run_agent
from llm.config.errors import UserError


def environment(
    place: JobAllocation, given: dict[str, str], *, nproc: int = 2, interface: str | None = None
) -> dict[str, str]:
    return agent_environment(place, given, nproc=nproc, num_cores=16, interface=interface)


def command(place: JobAllocation, port: int | None = None) -> str:
    return " ".join(agent_command(place, ["-m", "x"], nproc=4, max_restarts=3, port=port))


def test_agent_when_alone_without_a_job_then_meets_nobody_on_a_free_port() -> None:
    line = command(JobAllocation(("here",), rank=0))
    assert line.startswith(f"{sys.executable} -m llm.launch agent --nnodes 1 --nproc_per_node 4 ")
    assert "--rdzv_endpoint localhost:0" in line
    assert line.endswith("--max_restarts 3 -m x")


def test_agent_when_in_a_job_then_meets_at_its_port_of_the_first_host() -> None:
    line = command(JobAllocation(("n1", "n2"), "pbs", "20007.server", rank=1))
    assert "--nnodes 2 " in line
    assert "--rdzv_endpoint n1:20007 --rdzv_id llm-20007.server " in line
    assert "is_host=0 --local_addr n2" in line
    assert "--rdzv_endpoint n1:4000 " in command(JobAllocation(("n1", "n2"), job="7"), port=4000)


def test_agent_when_nothing_says_which_host_this_is_then_torch_finds_out() -> None:
    line = command(JobAllocation(("n1", "n2"), "slurm", "7"))
    assert "is_host" not in line
    assert "--local_addr" not in line


def test_agent_when_the_first_host_is_an_ipv6_address_then_it_is_in_brackets() -> None:
    assert "--rdzv_endpoint [fe80::1]:20007 " in command(JobAllocation(("fe80::1", "fe80::2"), job="7"))


@pytest.mark.parametrize(("scheduler", "kills_after"), [("pbs", 10), ("slurm", 30), (None, 31)])
def test_agent_when_told_to_stop_then_waits_less_than_the_scheduler(
    scheduler: Literal["pbs", "slurm"] | None, kills_after: int
) -> None:
    seconds = int(environment(JobAllocation(("a",), scheduler), {})["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert kills_after - 5 <= seconds < kills_after


def test_threads_when_pbs_preset_them_then_are_the_share_of_each_process() -> None:
    assert environment(JobAllocation(("a",), "pbs"), {"OMP_NUM_THREADS": "64"})["OMP_NUM_THREADS"] == "8"
    assert environment(JobAllocation(("a",)), {})["OMP_NUM_THREADS"] == "8"
    assert environment(JobAllocation(("a",)), {}, nproc=99)["OMP_NUM_THREADS"] == "1"


def test_threads_when_the_user_set_them_elsewhere_then_stay() -> None:
    assert environment(JobAllocation(("a",), "slurm"), {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


def test_variables_when_of_the_starter_or_of_another_host_then_are_dropped(tmp_path: object) -> None:
    given = {"PMI_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "TMPDIR": "/of/the/first/host", "HF_HOME": "/hf"}
    assert set(environment(JobAllocation(("a",)), given)) == {
        "HF_HOME",
        "OMP_NUM_THREADS",
        "PET_SIGNALS_TO_HANDLE",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
    }
    assert environment(JobAllocation(("a",)), {"TMPDIR": str(tmp_path)})["TMPDIR"] == str(tmp_path)


def test_interface_when_the_fast_one_is_there_then_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents.socket, "if_nameindex", lambda: [(1, "lo"), (2, "hsn0")])
    found = environment(JobAllocation(("a",)), {"NCCL_SOCKET_IFNAME": "hsn"})
    assert (found["NCCL_SOCKET_IFNAME"], found["GLOO_SOCKET_IFNAME"]) == ("hsn", "hsn0")
    asked = environment(JobAllocation(("a",)), {"NCCL_SOCKET_IFNAME": "hsn"}, interface="lo")
    assert (asked["NCCL_SOCKET_IFNAME"], asked["GLOO_SOCKET_IFNAME"]) == ("lo", "lo")


def test_interface_when_it_is_not_here_then_is_refused_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"--interface ib7: there is none of that name on .*; it has .*lo"):
        check_meeting(JobAllocation(("a",)), port=None, interface="ib7")


def test_port_when_taken_then_is_refused_on_the_first_host_alone() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .* is taken .*--port"):
            check_meeting(JobAllocation(("localhost", "b"), job="7", rank=0), port=port, interface=None)
        check_meeting(JobAllocation(("localhost", "b"), job="7", rank=1), port=port, interface=None)


def test_meeting_when_nobody_knows_the_first_host_then_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="knows no host n1"):
        check_meeting(JobAllocation(("n1", "n2"), rank=1), port=None, interface=None)
    check_meeting(JobAllocation(("n1",), rank=0), port=None, interface=None)


def test_meeting_when_the_port_of_named_hosts_is_taken_then_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setattr(JobAllocation, "port", taken.getsockname()[1])
        with pytest.raises(UserError, match="choose another with --port"):
            check_meeting(JobAllocation(("localhost", "127.0.0.1"), rank=0, is_told=True), port=None, interface=None)


def test_mistake_when_left_then_is_in_the_folder_that_all_starts_of_the_agent_share() -> None:
    starts = [{"TORCHELASTIC_ERROR_FILE": f"/tmp/of_agent/attempt_{start}/{start}/error.json"} for start in (0, 1)]
    assert {str(mistake_file(start)) for start in starts} == {"/tmp/of_agent/mistake"}
    assert mistake_file({}) is None


def failure(code: int) -> ChildFailedError:
    failed = ProcessFailure(local_rank=1, pid=7, exitcode=code, error_file="<N/A>")
    return ChildFailedError("llm.launch", {3: failed})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (failure(1), r"^rank 3 on \S+ ended with exit code 1, and is not started again; what it said stands above$"),
        (failure(-9), "rank 3 on .* was ended by SIGKILL"),
        (
            RendezvousTimeoutError("no\nidea"),
            r"did not meet the other hosts \(no\); `python -m llm.launch doctor` says",
        ),
    ],
)
def test_agent_when_its_processes_fail_then_is_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed.run, "run", Mock(side_effect=error))
    with pytest.raises(UserError, match=said):
        run_agent(["--nnodes", "1", "-m", "x"])


def test_agent_when_a_signal_ends_it_then_its_exit_code_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed.run, "run", Mock(side_effect=SignalException("", sigval=signal.SIGTERM)))
    assert run_agent(["-m", "x"]) == 143


def test_agent_when_run_then_its_processes_get_their_words(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--max_restarts", "0", "-m", "this"]
    assert run_agent(words) == 0
    assert "The Zen of Python" in capfd.readouterr().out
