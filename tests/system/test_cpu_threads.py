"""Threads: this process's share of the free cores, unless the user has chosen a number."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import llm.system.cgroups as cgroups
import llm.system.cpu_threads as threads
from llm.system.cpu_threads import num_free_cores, use_free_cores

LAUNCHER = {"ACCELERATE_MIXED_PRECISION": "no"}
# A launcher: starts a command with a variable that its own environment lacks.
LAUNCH = (
    "import os, subprocess, sys; sys.exit(subprocess.call(sys.argv[1:], env={**os.environ, 'OMP_NUM_THREADS': '1'}))"
)
# The worker uses one function of torch, and starts ten times as fast without the rest.
WORKER = """import sys, types
torch = sys.modules["torch"] = types.ModuleType("torch")
torch.set_num_threads = print
import llm.system.cpu_threads as threads
threads.num_free_cores = lambda: 8
threads.use_free_cores(2)
"""


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with eight hardware threads on four cores, without limits."""
    monkeypatch.setattr(cgroups, "PROC", tmp_path / "proc")
    monkeypatch.setattr(cgroups, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "_CPUS", tmp_path / "cpu")
    for cpu in range(8):
        write(tmp_path / f"cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_num_free_cores_when_two_threads_share_a_core_then_counts_it_once(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert num_free_cores() == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 5})
    assert num_free_cores() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {20, 21, 22})  # the kernel lists no siblings of these
    assert num_free_cores() == 3


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1)])
@pytest.mark.parametrize("folder", ["cgroup/a/b", "cgroup/a", "cgroup"])
def test_num_free_cores_when_a_cgroup_limits_them_then_returns_the_limit(
    node: Path, folder: str, limit: str, cores: int
) -> None:
    write(node / "proc/self/cgroup", "0::/a/b\n")
    write(node / folder / "cpu.max", limit + "\n")
    assert num_free_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 4), ("300000", 3)])
def test_num_free_cores_when_cgroups_are_of_version_1_then_their_quota_counts(
    node: Path, quota: str, cores: int
) -> None:
    write(node / "proc/self/cgroup", "5:memory:/a\n4:cpu,cpuacct:/a\n0::/\n")
    write(node / "cgroup/cpu,cpuacct/a/cpu.cfs_quota_us", quota + "\n")
    write(node / "cgroup/cpu,cpuacct/a/cpu.cfs_period_us", "100000\n")
    assert num_free_cores() == cores


def test_use_free_cores_when_the_user_chose_no_number_then_takes_the_share_and_never_more_than_torch(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for before, num_local, after in ((8, 1, 4), (8, 2, 2), (8, 9, 1), (1, 1, 1)):
        torch.set_num_threads(before)
        use_free_cores(num_local)
        assert torch.get_num_threads() == after


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a parent's environment is read from /proc")
@pytest.mark.parametrize(
    ("environment", "words", "expected"),
    [
        (LAUNCHER, [], 4),  # the launcher's own number
        ({"TORCHELASTIC_RUN_ID": "x"}, [], 4),
        ({}, [], None),  # without a launcher, the number is the user's
        ({**LAUNCHER, "OMP_NUM_THREADS": "1"}, [], None),  # the user set it for the launcher
        (LAUNCHER, ["--num_cpu_threads_per_process=1"], None),
    ],
)
def test_use_free_cores_when_the_launcher_set_one_thread_then_raises_it_and_keeps_a_users_one(
    environment: dict[str, str], words: list[str], expected: int | None
) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", LAUNCH, sys.executable, "-c", WORKER, *words],
        env={**inherited, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == ("" if expected is None else f"{expected}\n")
