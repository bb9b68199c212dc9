"""How much memory a device, or this process, has used, and how much is left."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from llm.system import cgroups
from llm.system.cgroups import cgroup_dirs, read_text


def reset_peak_bytes(device: torch.device) -> None:
    """Counts the peak of the memory from here, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # else it is the peak since the process began
        (cgroups.PROC / "self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The highest memory in use: the device's, or the process's where that is the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    found = _entry(cgroups.PROC / "self/status", "VmHWM:")
    # In kilobytes but for macOS, whose unit is a byte.
    return found or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """What this process holds now; 0 where the system does not say."""
    return _entry(cgroups.PROC / "self/status", "VmRSS:") or 0


def available_bytes() -> int | None:
    """What this process could still take without swapping, by the machine and by its cgroups; None if nobody says."""
    found = [_entry(cgroups.PROC / "meminfo", "MemAvailable:"), *map(_left_in, cgroup_dirs("memory"))]
    return min((left for left in found if left is not None), default=None)


def _left_in(group: Path) -> int | None:
    """Of a cgroup's limit; files that were only read can be dropped, and count as free."""
    for limit, used, cache in _OF_A_GROUP:
        most = read_text(group / limit).strip()
        if most.isdigit():  # "max" is no limit, and in the first version a number beyond all memory
            held, dropped = int(read_text(group / used) or 0), _entry(group / "memory.stat", cache, unit=1) or 0
            return max(0, int(most) - held + dropped)
    return None


# In the second version of cgroups, and in the first.
_OF_A_GROUP = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _entry(file: Path, name: str, *, unit: int = 1024) -> int | None:
    """The number behind a name, in bytes; None where there is no such line."""
    words = (line.split() for line in read_text(file).splitlines())
    return next((int(each[1]) * unit for each in words if each[:1] == [name]), None)
