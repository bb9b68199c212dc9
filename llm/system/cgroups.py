"""Where Linux says what a process may use of a machine's time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def cgroup_dirs(controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and of those above it, in either version of cgroups.

    Args:
        controller: `cpu` or `memory`.
    """
    for line in read_text(PROC / "self/cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        # Version 2 has no controllers there; in version 1 that of the CPU has a hierarchy of its own. A container may
        # see its own group as the root of all.
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controllers
        group = root / place.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield folder


def read_text(path: Path) -> str:
    """A file's text; nothing where it is not there."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
