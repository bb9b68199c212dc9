"""The number of threads that torch computes with on a CPU: this process's share of the free cores.

Launchers set OMP_NUM_THREADS to 1 by default (torchrun for more than one process, accelerate launch always); a number
that the user sets is respected. The launcher is the parent of this process: a variable that is missing in the
environment with which the parent was started was set by the parent.
"""

from __future__ import annotations

import os
from pathlib import Path

from llm.system import cgroups
from llm.system.cgroups import cgroup_dirs, read_text

_CPUS = Path("/sys/devices/system/cpu")
# A launcher sets at least one of these for the processes that it starts.
_LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
_NUM_THREADS = "OMP_NUM_THREADS"


def use_free_cores(num_local: int) -> None:
    """Set torch's number of threads to this process's share of the free cores, unless the user has chosen a number.

    Args:
        num_local: number of processes of the run on this node, which share its cores.
    """
    import torch  # imported here: the launcher counts cores and needs no torch

    share = max(1, num_free_cores() // num_local)
    if os.environ.get(_NUM_THREADS) is None:
        torch.set_num_threads(min(torch.get_num_threads(), share))
    elif os.environ[_NUM_THREADS] == "1" and _launcher_set_num_threads():
        torch.set_num_threads(share)


def num_free_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    Its CPU affinity and the quotas of its cgroups limit the number; two hardware threads of one core count once.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    cores = {read_text(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return max(1, int(min(len(cores), _cpu_quota())))


def _launcher_set_num_threads() -> bool:
    """Whether the launcher, not its user, has set OMP_NUM_THREADS; False if that cannot be read."""
    parent = cgroups.PROC / str(os.getppid())
    environment = read_text(parent / "environ")
    command_line = read_text(parent / "cmdline")
    if not environment or not any(name in os.environ for name in _LAUNCHER_VARIABLES):
        return False
    is_set_by_user = any(entry.startswith(f"{_NUM_THREADS}=") for entry in environment.split("\0"))
    return not is_set_by_user and "num_cpu_threads_per_process" not in command_line.replace("-", "_")


def _cpu_quota() -> float:
    """Return the number of CPUs that this process's cgroup and those above it allow; inf without a limit."""
    return min((_quota_of(folder) for folder in cgroup_dirs("cpu")), default=float("inf"))


def _quota_of(folder: Path) -> float:
    """Return the number of CPUs that one cgroup allows, from the files of version 2 or 1."""
    words = read_text(folder / "cpu.max").split()
    if not words:
        words = [
            read_text(folder / "cpu.cfs_quota_us").strip(),
            read_text(folder / "cpu.cfs_period_us").strip(),
        ]
    # "max" (version 2), -1 (version 1) and a missing file mean no limit.
    if not words[0].isdigit() or int(words[0]) == 0:
        return float("inf")
    return int(words[0]) / int(words[1])
