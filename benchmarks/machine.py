"""Description of the machine of a measurement, part of every result."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Instruction sets that decide in which dtypes a processor multiplies fast.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def describe_machine(*packages: str) -> dict[str, Any]:
    """Return system, processor, cores, load, and the versions of Python and of these packages."""
    return {
        "platform": platform.platform(),
        "processor": _cpuinfo_value("model name") or platform.processor(),
        "instructions": [name for name in _cpuinfo_value("flags", "Features").split() if name in _INSTRUCTIONS],
        "cores": num_cores(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo_value(*names: str) -> str:
    """Value of the first line of /proc/cpuinfo with one of these names; empty if there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""
