"""Memory: peak, resident, and available by the machine and by its cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llm.system.cgroups as cgroups
from llm.system.memory import available_bytes, peak_bytes, reset_peak_bytes, resident_bytes

GB = 2**30
CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with eight GiB available and without cgroups."""
    monkeypatch.setattr(cgroups, "PROC", tmp_path / "proc")
    monkeypatch.setattr(cgroups, "_CGROUPS", tmp_path / "cgroup")
    write(tmp_path / "proc/meminfo", f"MemTotal: {16 * GB // 1024} kB\nMemAvailable: {8 * GB // 1024} kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_available_bytes_when_no_cgroup_has_a_limit_then_is_the_machines(machine: Path) -> None:
    assert available_bytes() == 8 * GB
    write(machine / "proc/self/cgroup", "0::/a/b\n")
    write(machine / "cgroup/a/b/memory.max", "max\n")
    assert available_bytes() == 8 * GB
    (machine / "proc/meminfo").unlink()
    assert available_bytes() is None


@pytest.mark.parametrize("limited", ["a/b", "a", ""])
def test_available_bytes_when_a_cgroup_or_one_above_has_a_limit_then_is_what_it_has_left(
    machine: Path, limited: str
) -> None:
    write(machine / "proc/self/cgroup", "0::/a/b\n")
    group = machine / "cgroup" / limited
    write(group / "memory.max", f"{4 * GB}\n")
    write(group / "memory.current", f"{3 * GB}\n")
    assert available_bytes() == GB
    write(group / "memory.stat", f"anon {GB}\ninactive_file {2 * GB}\n")
    assert available_bytes() == 3 * GB
    write(group / "memory.max", f"{GB // 2}\n")
    assert available_bytes() == 0


def test_available_bytes_when_cgroups_are_of_version_1_then_their_files_count(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "5:memory:/a\n3:cpu,cpuacct:/\n")
    write(machine / "cgroup/memory/a/memory.limit_in_bytes", f"{2 * GB}\n")
    write(machine / "cgroup/memory/a/memory.usage_in_bytes", f"{GB}\n")
    write(machine / "cgroup/memory/memory.limit_in_bytes", f"{2**63 - 4096}\n")
    assert available_bytes() == GB


def test_peak_bytes_when_a_tensor_was_freed_then_includes_it_until_the_reset() -> None:
    reset_peak_bytes(CPU)
    before = peak_bytes(CPU)
    tensor = torch.ones(64 * 2**20)
    during = resident_bytes()
    assert during > before + 200 * 2**20 and peak_bytes(CPU) >= during
    del tensor
    reset_peak_bytes(CPU)
    assert peak_bytes(CPU) < during
