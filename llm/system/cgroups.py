"""Linux control groups: where the kernel lists the limits of a process's CPU time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def cgroup_dirs(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of all cgroups above it, in version 1 or 2 of cgroups.

    Args:
        controller: `cpu` or `memory`.
    """
    for line in read_text(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        # Version 2 lists no controllers on its line. Version 1 has one line and one hierarchy for each set of
        # controllers.
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controllers
        cgroup = root / path.lstrip("/")
        for folder in (cgroup, *cgroup.parents):
            # A container may see its own cgroup as the root of the hierarchy.
            if folder.is_relative_to(root):
                yield folder


def read_text(path: Path) -> str:
    """Return the text of a file, or an empty string if the file cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
