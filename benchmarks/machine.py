"""What a measurement was made on, as it stands in every result."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

# What decides which products a processor makes fast.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def describe_machine(*packages: str) -> dict[str, Any]:
    """System, processor, cores, load, and the versions of Python and of the packages that were measured."""
    return {
        "platform": platform.platform(),
        "processor": _of_cpuinfo("model name") or platform.processor(),
        "instructions": [name for name in _of_cpuinfo("flags", "Features").split() if name in _INSTRUCTIONS],
        "cores": num_cores(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _of_cpuinfo(*names: str) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""
