"""Facts about a host, and differences between hosts that should be equal."""

from __future__ import annotations

import hashlib
import platform
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llm.config import VERSION

_SOURCES = Path(__file__).parents[2]
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
_MAX_LISTED = 4


@dataclass(frozen=True)
class HostInfo:
    """Facts about a host, collected on it.

    Attributes:
        name: the host's own name.
        folder: working directory of its processes.
        num_processes: number of processes that it will start.
        device: cuda, xpu, … or cpu.
        num_devices: number of devices of that kind; 0 for the CPU.
        versions: of Python, of libraries, and of this package: name -> version.
    """

    name: str
    folder: str
    num_processes: int
    device: str
    num_devices: int
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the keyword arguments of `HostInfo`, as values that JSON can hold."""
        return asdict(self)


def collect_host_info(num_processes: int, *, use_cpu: bool = False) -> HostInfo:
    """Collect the facts about this host.

    Args:
        num_processes: number of processes that it will start.
        use_cpu: whether its accelerators are ignored.
    """
    device, num_devices = find_devices(use_cpu=use_cpu)
    return HostInfo(
        name=socket.gethostname(),
        folder=str(Path.cwd()),
        num_processes=num_processes,
        device=device,
        num_devices=num_devices,
        versions=_versions(),
    )


def find_devices(*, use_cpu: bool = False) -> tuple[str, int]:
    """Return the kind and number of this host's accelerators; cpu and 0 if no process group can use them."""
    device = None if use_cpu else torch.accelerator.current_accelerator()
    if device is None or device.type == "mps":  # Apple's has no collectives
        return "cpu", 0
    return device.type, torch.accelerator.device_count()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    versions["llm"] = f"{VERSION} ({_hash_of_sources()})"
    return versions


def _hash_of_sources() -> str:
    """Eight hex digits of a hash over this package's sources; they differ if a host has other ones, such as a copy."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.rglob("*.py")):
        digest.update(str(path.relative_to(_SOURCES)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def version_mismatch(hosts: Sequence[HostInfo]) -> str | None:
    """Return a line about the first version in which the hosts differ; None if they agree."""
    for name in hosts[0].versions:
        groups = group_hosts([(host.versions.get(name, "missing"), host.name) for host in hosts])
        if len(groups) > 1:
            return (
                f"{name} is {_format_groups(groups)}: install the same version on all hosts, or share one environment"
            )
    return None


def folder_mismatch(hosts: Sequence[HostInfo]) -> str | None:
    """Return a line about hosts with different working directories; None if they agree."""
    groups = group_hosts([(host.folder, host.name) for host in hosts])
    if len(groups) == 1:
        return None
    return f"the folder is {_format_groups(groups)}: change to one folder on all hosts first"


def device_problem(hosts: Sequence[HostInfo]) -> str | None:
    """Return a line about devices or process numbers that differ or do not fit; None if they are right."""
    kinds = group_hosts(
        [(f"{host.num_devices} x {host.device}" if host.num_devices else "cpu", host.name) for host in hosts]
    )
    if len(kinds) > 1:
        return f"the devices are {_format_groups(kinds)}: request nodes of one kind, and check for a device that failed"
    numbers = group_hosts([(str(host.num_processes), host.name) for host in hosts])
    if len(numbers) > 1:
        return f"the number of processes is {_format_groups(numbers)}: start the same number on every host (--nproc)"
    host = hosts[0]
    if 0 < host.num_devices < host.num_processes:
        return f"{host.num_processes} processes cannot share {host.num_devices} devices: set --nproc {host.num_devices}"
    return None


def group_hosts(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Group pairs of a value and a host's name by value; the value of the most hosts comes first."""
    groups: dict[str, list[str]] = {}
    for value, name in pairs:
        groups.setdefault(value, []).append(name)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _format_groups(groups: Mapping[str, Sequence[str]]) -> str:
    return " and ".join(f"{value} on {format_names(names)}" for value, names in groups.items())


def format_names(names: Sequence[str]) -> str:
    """Return the first four names separated by commas, and the number of the others."""
    listed = ", ".join(names[:_MAX_LISTED])
    return listed if len(names) <= _MAX_LISTED else f"{listed} and {len(names) - _MAX_LISTED} more"
