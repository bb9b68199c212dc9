"""Processes that form a group as a run's do, and measure how fast they agree."""

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

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from llm.clusters.doctor.rendezvous import Rendezvous, open_store
from llm.config.errors import first_line

# What a process may be waiting for, by the stage that it is in.
_STAGES = {
    "start": "the libraries to load",
    "group": "the process group of all",
    "latency": "an all-reduce of one number",
    "bandwidth": "an all-reduce of many numbers",
    "end": "the others to end",
}
_NUM_LATENCIES = 50
_LONGEST_MEASURING_SECONDS = 2.0
_MOST_REPEATS = 20
# Of a gradient's size on devices; less where every byte goes through the processor.
_NUM_BYTES = {"cpu": 16 << 20}
_NUM_BYTES_OF_DEVICES = 256 << 20
_POLL_SECONDS = 0.1
_LAST_WORDS_SECONDS = 5.0


@dataclass(frozen=True)
class Plan:
    """The group that is formed.

    Attributes:
        address: of the store.
        port: of the store.
        first_ranks: the first rank on each host; the next ones are its neighbours' there.
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
        """What carries the numbers, such as gloo or nccl."""
        return str(dist.get_default_backend_for_device(self.device))


@dataclass(frozen=True)
class Speed:
    """How fast a group agrees.

    Attributes:
        size: number of processes.
        latency_seconds: of an all-reduce of one number, the median.
        bytes_per_second: that each process sends and receives, 2 (n - 1) / n of the buffer an all-reduce.
        num_bytes: size of that buffer.

    Source: the "bus bandwidth" of NVIDIA's nccl-tests.
    """

    size: int
    latency_seconds: float
    bytes_per_second: float
    num_bytes: int

    def __str__(self) -> str:
        size = self.num_bytes >> 20
        rate = self.bytes_per_second / 1e9
        return f"{self.latency_seconds * 1e6:.0f} us for 4 B, {rate:.3g} GB/s for {size} MiB"


def run_processes(meeting: Rendezvous, plan: Plan, ranks: Sequence[int]) -> None:
    """Runs this host's processes to their end, or ends them; what failed is said under `failed/N`.

    Args:
        meeting: where the stages of the processes and what they measured are found.
        plan: the group.
        ranks: of this host.
    """
    spawn = multiprocessing.get_context("spawn")
    processes: dict[int, BaseProcess] = {}
    for rank in ranks:
        processes[rank] = spawn.Process(target=_work, args=(plan, rank, rank - ranks[0]), daemon=True)
        processes[rank].start()
    try:
        _attend(meeting, plan, processes)
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def _attend(meeting: Rendezvous, plan: Plan, processes: dict[int, BaseProcess]) -> None:
    stages = dict.fromkeys(processes, "start")
    began = dict.fromkeys(processes, time.monotonic())
    given_up: float | None = None
    while any(process.is_alive() for process in processes.values()):
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        if given_up is None and meeting.heard("failed/0") is not None:
            given_up = now
        if given_up is not None and now - given_up > min(_LAST_WORDS_SECONDS, plan.seconds):
            return
        for rank in processes:
            stage = meeting.heard(f"stage/{rank}") or "start"
            if stage != stages[rank]:
                stages[rank], began[rank] = stage, now
        late = [rank for rank in processes if processes[rank].is_alive() and now - began[rank] > plan.seconds]
        if late and given_up is None:
            _fail(meeting, late[0], stages[late[0]], f"waited {plan.seconds:.0f} s for {_STAGES[stages[late[0]]]}")
    for rank, process in processes.items():
        if process.exitcode and meeting.heard("failed/0") is None:
            _fail(meeting, rank, stages[rank], f"ended with exit code {process.exitcode}")


def _fail(meeting: Rendezvous, rank: int, stage: str, problem: str) -> None:
    number = meeting.count("failures")
    meeting.say(f"failed/{number}", {"rank": rank, "host": socket.gethostname(), "stage": stage, "problem": problem})


def _work(plan: Plan, rank: int, local_rank: int) -> None:
    """One process."""
    meeting = Rendezvous(plan.address, plan.port, seconds=plan.seconds, is_first=False)
    stage = "group"
    try:
        meeting.say(f"stage/{rank}", stage)
        device = torch.device(plan.device, local_rank) if plan.device != "cpu" else torch.device("cpu")
        if plan.device != "cpu":
            torch.accelerator.set_device_index(local_rank)
        if rank == 0:
            meeting.say("device", _name(device))
        _form_group(plan, rank)
        groups = {"all": dist.group.WORLD}
        if len(plan.first_ranks) > 1 and plan.size > len(plan.first_ranks):
            groups["hosts"] = dist.new_group(list(plan.first_ranks))
        for name, group in groups.items():
            if name == "hosts" and rank not in plan.first_ranks:
                continue
            stage = "latency"
            meeting.say(f"stage/{rank}", stage)
            latency = _measure_latency(device, group)
            stage = "bandwidth"
            meeting.say(f"stage/{rank}", stage)
            rate, num_bytes = _measure_bandwidth(device, group)
            if rank == 0:
                meeting.say(f"speed/{name}", [dist.get_world_size(group), latency, rate, num_bytes])
        stage = "end"
        meeting.say(f"stage/{rank}", stage)
        dist.barrier()
    except Exception as error:  # whatever it is, the doctor's reader is to see it in one line
        _fail(meeting, rank, stage, f"{type(error).__name__}: {first_line(error)}")
    # Neither a group that is broken nor one that is fine is worth the wait for its threads to end.
    os._exit(0)


def _form_group(plan: Plan, rank: int) -> None:
    patience = timedelta(seconds=plan.seconds)
    store = open_store(plan.address, plan.port, is_first=False, seconds=plan.seconds)
    dist.init_process_group(
        plan.backend,
        store=PrefixStore("group", store),
        rank=rank,
        world_size=plan.size,
        timeout=patience,
    )


def _name(device: torch.device) -> str:
    """A device's name as its maker gives it."""
    if device.type == "cpu":
        return "cpu"
    module = torch.get_device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type


def _measure_latency(device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Seconds of an all-reduce of one number.

    Raises:
        ArithmeticError: the sum is wrong.
    """
    size = dist.get_world_size(group)
    own = dist.get_rank(group) + 1
    seconds = []
    for _ in range(_NUM_LATENCIES):
        number = torch.full((1,), float(own), device=device)
        seconds.append(_timed(lambda number=number: dist.all_reduce(number, group=group), device))  # type: ignore[misc]
        if number.item() != size * (size + 1) / 2:
            raise ArithmeticError(f"the sum of 1 to {size} came out as {number.item():g}")
    return median(seconds[_NUM_LATENCIES // 5 :])


def _measure_bandwidth(device: torch.device, group: dist.ProcessGroup | None) -> tuple[float, int]:
    """Bytes a second of an all-reduce, and the bytes that it is of."""
    size = dist.get_world_size(group)
    num_bytes = _NUM_BYTES.get(device.type, _NUM_BYTES_OF_DEVICES)
    numbers = torch.zeros(num_bytes // 4, device=device)

    def reduce() -> None:
        dist.all_reduce(numbers, group=group)

    once = torch.tensor([_timed(reduce, device)], device=device)
    dist.all_reduce(once, dist.ReduceOp.MAX, group=group)
    repeats = max(1, min(_MOST_REPEATS, int(_LONGEST_MEASURING_SECONDS / max(once.item(), 1e-6))))
    seconds = median([_timed(reduce, device) for _ in range(repeats)])
    return num_bytes * 2 * (size - 1) / size / seconds, num_bytes


def _timed(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began
