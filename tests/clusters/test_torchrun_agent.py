"""torchrun's agent on a host: its command, its environment, and how its end is reported."""

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

import llm.clusters.torchrun_agent
from llm.clusters.allocation import JobAllocation
from llm.clusters.torchrun_agent import agent_command, agent_environment, check_rendezvous, run_agent, user_error_file
from llm.config.errors import UserError


def environment(
    allocation: JobAllocation, variables: dict[str, str], *, nproc: int = 2, interface: str | None = None
) -> dict[str, str]:
    return agent_environment(allocation, variables, nproc=nproc, num_cores=16, interface=interface)


def command(allocation: JobAllocation, port: int | None = None) -> str:
    return " ".join(agent_command(allocation, ["-m", "x"], nproc=4, max_restarts=3, port=port))


def test_agent_when_on_one_host_outside_a_job_then_takes_a_free_port() -> None:
    line = command(JobAllocation(("here",), rank=0))
    assert line.startswith(f"{sys.executable} -m llm.launch agent --nnodes 1 --nproc_per_node 4 ")
    assert "--rdzv_endpoint localhost:0" in line
    assert line.endswith("--max_restarts 3 -m x")


def test_agent_when_in_a_job_then_the_rendezvous_is_at_the_jobs_port_of_the_first_host() -> None:
    line = command(JobAllocation(("n1", "n2"), "pbs", "20007.server", rank=1))
    assert "--nnodes 2 " in line
    assert "--rdzv_endpoint n1:20007 --rdzv_id llm-20007.server " in line
    assert "is_host=0 --local_addr n2" in line
    assert "--rdzv_endpoint n1:4000 " in command(JobAllocation(("n1", "n2"), job="7"), port=4000)


def test_agent_when_its_rank_is_unknown_then_torch_finds_it() -> None:
    line = command(JobAllocation(("n1", "n2"), "slurm", "7"))
    assert "is_host" not in line
    assert "--local_addr" not in line


def test_agent_when_the_first_host_is_an_ipv6_address_then_brackets_enclose_it() -> None:
    assert "--rdzv_endpoint [fe80::1]:20007 " in command(JobAllocation(("fe80::1", "fe80::2"), job="7"))


@pytest.mark.parametrize(("scheduler", "kills_after"), [("pbs", 10), ("slurm", 30), (None, 31)])
def test_agent_when_stopped_then_waits_less_than_the_scheduler(
    scheduler: Literal["pbs", "slurm"] | None, kills_after: int
) -> None:
    seconds = int(environment(JobAllocation(("a",), scheduler), {})["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert kills_after - 5 <= seconds < kills_after


def test_threads_when_preset_by_pbs_then_are_divided_among_the_processes() -> None:
    assert environment(JobAllocation(("a",), "pbs"), {"OMP_NUM_THREADS": "64"})["OMP_NUM_THREADS"] == "8"
    assert environment(JobAllocation(("a",)), {})["OMP_NUM_THREADS"] == "8"
    assert environment(JobAllocation(("a",)), {}, nproc=99)["OMP_NUM_THREADS"] == "1"


def test_threads_when_set_by_the_user_outside_pbs_then_are_kept() -> None:
    assert environment(JobAllocation(("a",), "slurm"), {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


def test_variables_when_of_the_launcher_or_of_another_host_then_are_dropped(tmp_path: object) -> None:
    variables = {"PMI_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "TMPDIR": "/of/the/first/host", "HF_HOME": "/hf"}
    assert set(environment(JobAllocation(("a",)), variables)) == {
        "HF_HOME",
        "OMP_NUM_THREADS",
        "PET_SIGNALS_TO_HANDLE",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
    }
    assert environment(JobAllocation(("a",)), {"TMPDIR": str(tmp_path)})["TMPDIR"] == str(tmp_path)


def test_interface_when_the_fast_one_exists_then_is_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llm.clusters.torchrun_agent.socket, "if_nameindex", lambda: [(1, "lo"), (2, "hsn0")])
    default = environment(JobAllocation(("a",)), {"NCCL_SOCKET_IFNAME": "hsn"})
    assert (default["NCCL_SOCKET_IFNAME"], default["GLOO_SOCKET_IFNAME"]) == ("hsn", "hsn0")
    named = environment(JobAllocation(("a",)), {"NCCL_SOCKET_IFNAME": "hsn"}, interface="lo")
    assert (named["NCCL_SOCKET_IFNAME"], named["GLOO_SOCKET_IFNAME"]) == ("lo", "lo")


def test_interface_when_missing_on_this_host_then_is_refused_with_the_existing_ones() -> None:
    with pytest.raises(UserError, match=r"--interface ib7: .* has no interface of this name; it has .*lo"):
        check_rendezvous(JobAllocation(("a",)), port=None, interface="ib7")


def test_port_when_in_use_then_is_refused_on_the_first_host_only() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .* is in use .*--port"):
            check_rendezvous(JobAllocation(("localhost", "b"), job="7", rank=0), port=port, interface=None)
        check_rendezvous(JobAllocation(("localhost", "b"), job="7", rank=1), port=port, interface=None)


def test_rendezvous_when_the_first_host_is_unknown_then_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="cannot resolve n1"):
        check_rendezvous(JobAllocation(("n1", "n2"), rank=1), port=None, interface=None)
    check_rendezvous(JobAllocation(("n1",), rank=0), port=None, interface=None)


def test_rendezvous_when_the_port_of_explicit_hosts_is_in_use_then_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setattr(JobAllocation, "port", taken.getsockname()[1])
        with pytest.raises(UserError, match="choose another one with --port"):
            check_rendezvous(
                JobAllocation(("localhost", "127.0.0.1"), rank=0, is_explicit=True), port=None, interface=None
            )


def test_user_error_when_recorded_then_the_file_is_shared_by_all_restarts_of_the_agent() -> None:
    environments = [
        {"TORCHELASTIC_ERROR_FILE": f"/tmp/of_agent/attempt_{start}/{start}/error.json"} for start in (0, 1)
    ]
    assert {str(user_error_file(environment)) for environment in environments} == {"/tmp/of_agent/mistake"}
    assert user_error_file({}) is None


def failure(code: int) -> ChildFailedError:
    failed = ProcessFailure(local_rank=1, pid=7, exitcode=code, error_file="<N/A>")
    return ChildFailedError("llm.launch", {3: failed})


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (failure(1), r"^rank 3 on \S+ ended with exit code 1 and is not restarted; see its messages above$"),
        (failure(-9), "rank 3 on .* was ended by SIGKILL"),
        (
            RendezvousTimeoutError("no\nidea"),
            r"did not reach the other hosts \(no\); `python -m llm.launch doctor` finds",
        ),
    ],
)
def test_agent_when_its_processes_fail_then_raises_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed.run, "run", Mock(side_effect=error))
    with pytest.raises(UserError, match=message):
        run_agent(["--nnodes", "1", "-m", "x"])


def test_agent_when_a_signal_ends_it_then_the_exit_code_names_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed.run, "run", Mock(side_effect=SignalException("", sigval=signal.SIGTERM)))
    assert run_agent(["-m", "x"]) == 143


def test_agent_when_run_then_its_processes_run_the_module(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--max_restarts", "0", "-m", "this"]
    assert run_agent(words) == 0
    assert "The Zen of Python" in capfd.readouterr().out
