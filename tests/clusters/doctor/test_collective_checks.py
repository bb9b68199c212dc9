"""The doctor's processes: what they measure, and how a failure is reported."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from llm.clusters.doctor.collective_checks import AllReduceSpeed, GroupPlan, format_failure, run_processes
from llm.clusters.doctor.rendezvous import Rendezvous

ONE_HOST = GroupPlan(address="localhost", port=0, first_ranks=(0,), size=2, device="cpu", seconds=60)
TWO_HOSTS = replace(ONE_HOST, first_ranks=(0, 1))


def test_speed_when_printed_then_has_microseconds_and_gigabytes_per_second() -> None:
    speed = AllReduceSpeed(size=8, latency_seconds=31.4e-6, bytes_per_second=2.345e11, num_bytes=256 << 20)
    assert str(speed) == "31 us for 4 B, 234 GB/s for 256 MiB"


def test_plan_when_on_the_cpu_then_its_backend_is_gloo() -> None:
    assert ONE_HOST.backend == "gloo"


@pytest.mark.parametrize(
    ("plan", "stage", "fix"),
    [
        (TWO_HOSTS, "start", "--seconds"),
        (TWO_HOSTS, "group", "GLOO_SOCKET_IFNAME (--interface)"),
        (ONE_HOST, "group", "devices and the driver"),
    ],
)
def test_failure_when_formatted_then_names_the_process_and_the_fix(plan: GroupPlan, stage: str, fix: str) -> None:
    line = format_failure({"rank": 1, "host": "n2", "stage": stage, "problem": "Error: no"}, plan)
    assert line.startswith("rank 1 on n2 ")
    assert "Error: no" in line
    assert fix in line


def test_processes_when_a_stage_takes_too_long_then_the_first_failure_names_it() -> None:
    rendezvous = Rendezvous("localhost", 0, is_first=True, seconds=30)
    run_processes(rendezvous, replace(ONE_HOST, port=rendezvous.port, seconds=0.1), [0])
    failure = rendezvous.get("failed/0")
    assert (failure["rank"], failure["host"], failure["stage"]) == (0, socket.gethostname(), "start")
    assert "the libraries to load" in failure["problem"]


@pytest.mark.slow
def test_processes_when_all_is_well_then_store_their_measurements() -> None:
    rendezvous = Rendezvous("localhost", 0, is_first=True, seconds=60)
    run_processes(rendezvous, replace(ONE_HOST, port=rendezvous.port), [0, 1])
    assert rendezvous.get("failed/0") is None
    size, latency_seconds, bytes_per_second, num_bytes = rendezvous.get("speed/all")
    assert (size, num_bytes) == (2, 16 << 20)
    assert 0 < latency_seconds < 5
    assert bytes_per_second > 0
    assert rendezvous.get("device") == "cpu"
    assert [rendezvous.get(f"stage/{rank}") for rank in (0, 1)] == ["end", "end"]
