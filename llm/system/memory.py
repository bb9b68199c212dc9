"""The memory that a device or this process has used, and the memory that is available."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from llm.system import cgroups
from llm.system.cgroups import cgroup_dirs, read_text

# For version 2 of cgroups, then version 1: files of the limit and of the use, and the entry of memory.stat that counts
# droppable file caches.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def reset_peak_bytes(device: torch.device) -> None:
    """Reset the peak that `peak_bytes` returns to the present use, if the system supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # without it, the peak counts from the start of the process
        (cgroups.PROC / "self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on a CUDA device, or resident in this process for other devices."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = _entry_bytes(cgroups.PROC / "self/status", "VmHWM:")
    if peak:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, other systems kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes; 0 if the system does not report it."""
    return _entry_bytes(cgroups.PROC / "self/status", "VmRSS:") or 0


def available_bytes() -> int | None:
    """Return the bytes that this process can still allocate without swapping; None if the system does not report it.

    The number is the smallest of what the machine and each cgroup of this process have left.
    """
    limits = [_entry_bytes(cgroups.PROC / "meminfo", "MemAvailable:")]
    limits += [_available_in(folder) for folder in cgroup_dirs("memory")]
    return min((limit for limit in limits if limit is not None), default=None)


def _available_in(folder: Path) -> int | None:
    """Return the bytes left of a cgroup's limit, None without a limit; droppable file caches count as free."""
    for limit_file, usage_file, cache_entry in _CGROUP_FILES:
        limit = read_text(folder / limit_file).strip()
        # No limit is "max" in version 2, and a number larger than any memory in version 1.
        if limit.isdigit():
            used = int(read_text(folder / usage_file) or 0)
            droppable = _entry_bytes(folder / "memory.stat", cache_entry, unit=1) or 0
            return max(0, int(limit) - used + droppable)
    return None


def _entry_bytes(file: Path, name: str, *, unit: int = 1024) -> int | None:
    """Return the number behind `name` on a line of the file, times `unit` bytes; None without such a line."""
    for line in read_text(file).splitlines():
        words = line.split()
        if words[:1] == [name]:
            return int(words[1]) * unit
    return None
