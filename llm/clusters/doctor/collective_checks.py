"""Processes that form a process group as a run's do, and measure its all-reduce."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from llm.clusters.doctor.rendezvous import Rendezvous, open_store
from llm.config.errors import first_line

# Stages of a process, and what it waits for in each.
_STAGES = {
    "start": "the libraries to load",
    "group": "the process group of all",
    "latency": "an all-reduce of one number",
    "bandwidth": "an all-reduce of many numbers",
    "end": "the others to end",
}
_NUM_LATENCIES = 50
_MAX_MEASURE_SECONDS = 2.0
_MAX_REPEATS = 20
# About the size of a model's gradients on accelerators; less on the CPU, where every byte passes through the cores.
_CPU_BUFFER_BYTES = 16 << 20
_DEVICE_BUFFER_BYTES = 256 << 20
_POLL_SECONDS = 0.1
# How long the other processes may still run after the first failure, to report theirs.
_EXIT_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class GroupPlan:
    """The process group to form.

    Attributes:
        address: of the store.
        port: of the store.
        first_ranks: the first rank on each host; the other ranks of a host follow it.
        size: number of processes.
        device: cuda, xpu, … or cpu.
        seconds: how long each stage may take.
    """

    address: str
    port: int
    first_ranks: tuple[int, ...]
    size: int
    device: str
    seconds: float

    @property
    def backend(self) -> str:
        """The backend of the process group, such as gloo or nccl."""
        return str(dist.get_default_backend_for_device(self.device))


@dataclass(frozen=True)
class AllReduceSpeed:
    """Latency and bandwidth of a group's all-reduce.

    Attributes:
        size: number of processes.
        latency_seconds: median time of an all-reduce of one number.
        bytes_per_second: that each process sends and receives, 2 (n - 1) / n of the buffer in an all-reduce.
        num_bytes: size of that buffer.

    Source: the "bus bandwidth" of NVIDIA's nccl-tests.
    """

    size: int
    latency_seconds: float
    bytes_per_second: float
    num_bytes: int

    def __str__(self) -> str:
        latency = self.latency_seconds * 1e6
        bandwidth = self.bytes_per_second / 1e9
        return f"{latency:.0f} us for 4 B, {bandwidth:.3g} GB/s for {self.num_bytes >> 20} MiB"


def run_processes(rendezvous: Rendezvous, plan: GroupPlan, ranks: Sequence[int]) -> None:
    """Run this host's processes until they have ended or a stage took too long, then kill those that are left.

    Failures are stored in the rendezvous as `failed/0`, `failed/1`, ...

    Args:
        rendezvous: where the processes store their stages and measurements.
        plan: the group.
        ranks: of this host.
    """
    spawn = multiprocessing.get_context("spawn")
    processes: dict[int, BaseProcess] = {}
    for rank in ranks:
        processes[rank] = spawn.Process(target=_work, args=(plan, rank, rank - ranks[0]), daemon=True)
        processes[rank].start()
    try:
        _supervise(rendezvous, plan, processes)
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def format_failure(failure: dict[str, Any], plan: GroupPlan) -> str:
    """Return a line about the failure of a process, with the usual fix: for its start, one host, or the network.

    Args:
        failure: what `run_processes` stored: rank, host, stage, problem.
        plan: the group that failed.
    """
    where = f"rank {failure['rank']} on {failure['host']}"
    if failure["stage"] == "start":
        return f"{where} {failure['problem']}: see its messages above; --seconds gives slow disks more time"
    if len(plan.first_ranks) == 1:
        fix = "check the devices and the driver of this host"
    else:
        prefix = {"gloo": "GLOO", "nccl": "NCCL", "xccl": "CCL"}.get(plan.backend, plan.backend.upper())
        fix = (
            f"check that {prefix}_SOCKET_IFNAME (--interface) names a network that joins all hosts, without a firewall"
        )
    return f"{where} in {failure['stage']}: {failure['problem']}: {fix}"


def _supervise(rendezvous: Rendezvous, plan: GroupPlan, processes: dict[int, BaseProcess]) -> None:
    """Return when all processes have ended, or some time after the first failure on any host."""
    stages = dict.fromkeys(processes, "start")
    stage_began = dict.fromkeys(processes, time.monotonic())
    failed_at: float | None = None
    while any(process.is_alive() for process in processes.values()):
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        if failed_at is None and rendezvous.get("failed/0") is not None:
            failed_at = now
        if failed_at is not None and now - failed_at > min(_EXIT_GRACE_SECONDS, plan.seconds):
            return
        for rank in processes:
            stage = rendezvous.get(f"stage/{rank}") or "start"
            if stage != stages[rank]:
                stages[rank] = stage
                stage_began[rank] = now
        late = [rank for rank in processes if processes[rank].is_alive() and now - stage_began[rank] > plan.seconds]
        if late and failed_at is None:
            stage = stages[late[0]]
            _report_failure(rendezvous, late[0], stage, f"waited {plan.seconds:.0f} s for {_STAGES[stage]}")
    for rank, process in processes.items():
        if process.exitcode and rendezvous.get("failed/0") is None:
            _report_failure(rendezvous, rank, stages[rank], f"ended with exit code {process.exitcode}")


def _report_failure(rendezvous: Rendezvous, rank: int, stage: str, problem: str) -> None:
    number = rendezvous.next_number("failures")
    failure = {"rank": rank, "host": socket.gethostname(), "stage": stage, "problem": problem}
    rendezvous.set(f"failed/{number}", failure)


def _work(plan: GroupPlan, rank: int, local_rank: int) -> None:
    """Main function of one process."""
    rendezvous = Rendezvous(plan.address, plan.port, seconds=plan.seconds, is_first=False)
    stage = "group"
    try:
        rendezvous.set(f"stage/{rank}", stage)
        device = torch.device(plan.device, local_rank) if plan.device != "cpu" else torch.device("cpu")
        if plan.device != "cpu":
            torch.accelerator.set_device_index(local_rank)
        if rank == 0:
            rendezvous.set("device", _device_name(device))
        _form_group(plan, rank)
        groups = {"all": dist.group.WORLD}
        if len(plan.first_ranks) > 1 and plan.size > len(plan.first_ranks):
            groups["hosts"] = dist.new_group(list(plan.first_ranks))
        for name, group in groups.items():
            if name == "hosts" and rank not in plan.first_ranks:
                continue
            stage = "latency"
            rendezvous.set(f"stage/{rank}", stage)
            latency = _measure_latency(device, group)
            stage = "bandwidth"
            rendezvous.set(f"stage/{rank}", stage)
            bandwidth, num_bytes = _measure_bandwidth(device, group)
            if rank == 0:
                rendezvous.set(f"speed/{name}", [dist.get_world_size(group), latency, bandwidth, num_bytes])
        stage = "end"
        rendezvous.set(f"stage/{rank}", stage)
        dist.barrier()
    except Exception as error:  # any failure becomes one line of the doctor's report
        _report_failure(rendezvous, rank, stage, f"{type(error).__name__}: {first_line(error)}")
    # Leave at once: to wait for the group's threads is of no use, whether the group works or not.
    os._exit(0)


def _form_group(plan: GroupPlan, rank: int) -> None:
    store = open_store(plan.address, plan.port, is_first=False, seconds=plan.seconds)
    dist.init_process_group(
        plan.backend,
        store=PrefixStore("group", store),
        rank=rank,
        world_size=plan.size,
        timeout=timedelta(seconds=plan.seconds),
    )


def _device_name(device: torch.device) -> str:
    """The vendor's name of a device."""
    if device.type == "cpu":
        return "cpu"
    module = torch.get_device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type


def _measure_latency(device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Median seconds of an all-reduce of one number.

    Raises:
        ArithmeticError: the sum is wrong.
    """
    size = dist.get_world_size(group)
    summand = dist.get_rank(group) + 1
    seconds = []
    for _ in range(_NUM_LATENCIES):
        number = torch.full((1,), float(summand), device=device)
        seconds.append(_timed(lambda number=number: dist.all_reduce(number, group=group), device))  # type: ignore[misc]
        if number.item() != size * (size + 1) / 2:
            raise ArithmeticError(f"the sum of 1 to {size} came out as {number.item():g}")
    return median(seconds[_NUM_LATENCIES // 5 :])


def _measure_bandwidth(device: torch.device, group: dist.ProcessGroup | None) -> tuple[float, int]:
    """Bytes per second of an all-reduce, and the size of its buffer in bytes."""
    size = dist.get_world_size(group)
    num_bytes = _CPU_BUFFER_BYTES if device.type == "cpu" else _DEVICE_BUFFER_BYTES
    buffer = torch.zeros(num_bytes // 4, device=device)

    def reduce() -> None:
        dist.all_reduce(buffer, group=group)

    first_seconds = torch.tensor([_timed(reduce, device)], device=device)
    dist.all_reduce(first_seconds, dist.ReduceOp.MAX, group=group)
    repeats = max(1, min(_MAX_REPEATS, int(_MAX_MEASURE_SECONDS / max(first_seconds.item(), 1e-6))))
    seconds = median([_timed(reduce, device) for _ in range(repeats)])
    return num_bytes * 2 * (size - 1) / size / seconds, num_bytes


def _timed(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began
