"""How many threads this process computes with on a CPU: the cores that are really free for it.

A launcher sets OMP_NUM_THREADS to 1 for lack of a better number (torchrun for several processes, accelerate launch
always); a user who sets it means it. The launcher is this process's parent: what the parent did not find in its own
environment when it began, it has set itself.
"""

from __future__ import annotations

import os
from pathlib import Path

from llm.system import cgroups
from llm.system.cgroups import cgroup_dirs, read_text

_CPUS = Path("/sys/devices/system/cpu")
# Any of these says that a launcher started this process.
_LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
_ASKED = "OMP_NUM_THREADS"


def use_free_cores(num_local: int) -> None:
    """Sets torch's threads to this process's share of the free cores, unless the user has chosen a number.

    Args:
        num_local: processes of the run on this node, which share its cores.
    """
    import torch  # late: a launcher counts cores, and computes nothing

    share = max(1, num_free_cores() // num_local)
    if os.environ.get(_ASKED) is None:
        torch.set_num_threads(min(torch.get_num_threads(), share))
    elif os.environ[_ASKED] == "1" and _is_launchers():
        torch.set_num_threads(share)


def num_free_cores() -> int:
    """Cores that this process may use: by its affinity and its cgroup's quota; two threads of one core are one."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = {read_text(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    return max(1, int(min(len(cores), _quota())))


def _is_launchers() -> bool:
    """Whether the number of threads comes from the launcher and not from its user; False where that cannot be seen."""
    parent = cgroups.PROC / str(os.getppid())
    given, words = read_text(parent / "environ"), read_text(parent / "cmdline")
    if not given or not any(name in os.environ for name in _LAUNCHED):
        return False
    is_users = any(entry.startswith(f"{_ASKED}=") for entry in given.split("\0"))
    return not is_users and "num_cpu_threads_per_process" not in words.replace("-", "_")


def _quota() -> float:
    """CPUs' worth of time that this process's cgroup, or one above it, allows; inf without a limit."""
    return min((_quota_of(folder) for folder in cgroup_dirs("cpu")), default=float("inf"))


def _quota_of(folder: Path) -> float:
    """The limit of one cgroup, in either version's files."""
    words = read_text(folder / "cpu.max").split() or [
        read_text(folder / f"cpu.cfs_{what}_us").strip() for what in ("quota", "period")
    ]
    # "max" and -1 are no limit.
    return int(words[0]) / int(words[1]) if words[0].isdigit() and int(words[0]) > 0 else float("inf")
