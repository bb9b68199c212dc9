"""What hosts say of themselves, and the first thing in which they differ."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest

from llm.clusters.doctor.host_info import (
    HostInfo,
    collect_host_info,
    device_mistake,
    find_devices,
    folder_mistake,
    short,
    version_mistake,
)

HOST = HostInfo("n1", "/work", 4, "cuda", 4, {"python": "3.12.1", "torch": "2.13.0"})


def others(number: int, **different: object) -> list[HostInfo]:
    """A host as it should be, and some that are not."""
    return [HOST, *(replace(HOST, name=f"n{rank + 2}", **different) for rank in range(number))]  # type: ignore[arg-type]


def test_facts_when_looked_for_here_then_are_those_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = collect_host_info(2, use_cpu=True)
    assert (found.folder, found.num_processes, found.device, found.num_devices) == (str(tmp_path), 2, "cpu", 0)
    assert found.versions["python"] == platform.python_version()
    assert {"torch", "transformers", "llm"} <= found.versions.keys()
    assert HostInfo(**found.to_json()) == found
    assert find_devices(use_cpu=True) == ("cpu", 0)


def test_hosts_when_equal_then_there_is_nothing_to_mend() -> None:
    hosts = others(3)
    assert (version_mistake(hosts), folder_mistake(hosts), device_mistake(hosts)) == (None, None, None)


def test_versions_when_one_host_differs_then_it_is_named_with_both() -> None:
    hosts = [*others(2), replace(HOST, name="n4", versions={**HOST.versions, "torch": "2.9.1"})]
    assert version_mistake(hosts) == (
        "torch is 2.13.0 on n1, n2, n3 and 2.9.1 on n4: install the same version on all hosts, or share one environment"
    )
    assert "torch is 2.13.0 on n1 and missing on n2" in str(version_mistake(others(1, versions={"python": "3.12.1"})))


def test_folder_when_one_host_runs_elsewhere_then_it_is_named() -> None:
    assert "the folder is /work on n1 and /home/me on n2: " in str(folder_mistake(others(1, folder="/home/me")))


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        (others(1, num_devices=3), "the devices are 4 x cuda on n1 and 3 x cuda on n2"),
        (others(1, device="cpu", num_devices=0), "the devices are 4 x cuda on n1 and cpu on n2"),
        (others(1, num_processes=2), "the number of processes is 4 on n1 and 2 on n2"),
        ([replace(HOST, num_processes=8)], "8 processes cannot share 4 devices: set --nproc 4"),
    ],
)
def test_devices_when_they_do_not_fit_then_the_line_says_where(hosts: list[HostInfo], said: str) -> None:
    assert said in str(device_mistake(hosts))


def test_names_when_they_are_many_then_a_few_are_said() -> None:
    assert short([f"n{number}" for number in range(9)]) == "n0, n1, n2, n3 and 5 more"
