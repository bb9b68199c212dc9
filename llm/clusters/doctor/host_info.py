"""What a host says of itself, and in what hosts that should be equal differ."""

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

import llm

_SOURCES = Path(llm.__file__).parent
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True)
class HostInfo:
    """A host, as it sees itself.

    Attributes:
        name: what the others call it.
        folder: where its processes run.
        num_processes: that it will start.
        device: cuda, xpu, … or cpu.
        num_devices: of that kind; 0 for the CPU.
        versions: of Python, of libraries, and of this package: name -> version.
    """

    name: str
    folder: str
    num_processes: int
    device: str
    num_devices: int
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """What `HostInfo(**…)` takes."""
        return asdict(self)


def collect_host_info(num_processes: int, *, use_cpu: bool = False) -> HostInfo:
    """The facts of this host.

    Args:
        num_processes: that it will start.
        use_cpu: leave its accelerators alone.
    """
    device, num_devices = find_devices(use_cpu=use_cpu)
    return HostInfo(socket.gethostname(), str(Path.cwd()), num_processes, device, num_devices, _versions())


def find_devices(*, use_cpu: bool = False) -> tuple[str, int]:
    """The kind of this host's accelerators and their number; cpu and 0 where no process group runs on them."""
    found = None if use_cpu else torch.accelerator.current_accelerator()
    if found is None or found.type == "mps":  # Apple's has no collectives
        return "cpu", 0
    return found.type, torch.accelerator.device_count()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return {**found, "llm": f"{llm.__version__} ({_hash_of_sources()})"}


def _hash_of_sources() -> str:
    """Eight digits that differ where one host has other sources of this package, such as an old copy."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.rglob("*.py")):
        digest.update(str(path.relative_to(_SOURCES)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def version_mistake(hosts: Sequence[HostInfo]) -> str | None:
    """The first version in which hosts differ, in one line."""
    for name in hosts[0].versions:
        found = group([(host.versions.get(name, "missing"), host.name) for host in hosts])
        if len(found) > 1:
            return f"{name} is {_either(found)}: install the same version on all hosts, or share one environment"
    return None


def folder_mistake(hosts: Sequence[HostInfo]) -> str | None:
    """Hosts whose processes run in different folders, in one line."""
    found = group([(host.folder, host.name) for host in hosts])
    return f"the folder is {_either(found)}: change to one folder on all hosts first" if len(found) > 1 else None


def device_mistake(hosts: Sequence[HostInfo]) -> str | None:
    """What is wrong with the devices, in one line."""
    kinds = group([(f"{host.num_devices} x {host.device}" if host.num_devices else "cpu", host.name) for host in hosts])
    if len(kinds) > 1:
        return f"the devices are {_either(kinds)}: ask for nodes of one kind, and look for a device that is gone"
    numbers = group([(str(host.num_processes), host.name) for host in hosts])
    if len(numbers) > 1:
        return f"the number of processes is {_either(numbers)}: start the same number on every host (--nproc)"
    host = hosts[0]
    if 0 < host.num_devices < host.num_processes:
        return f"{host.num_processes} processes cannot share {host.num_devices} devices: set --nproc {host.num_devices}"
    return None


def group(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Names by what they have, that of the most first."""
    found: dict[str, list[str]] = {}
    for value, name in pairs:
        found.setdefault(value, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _either(found: Mapping[str, Sequence[str]]) -> str:
    return " and ".join(f"{value} on {short(names)}" for value, names in found.items())


def short(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
