"""Facts about hosts, and the first one in which they differ."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest

from llm.clusters.doctor.host_info import (
    HostInfo,
    collect_host_info,
    device_problem,
    find_devices,
    folder_mismatch,
    format_names,
    group_hosts,
    version_mismatch,
)

HOST = HostInfo("n1", "/work", 4, "cuda", 4, {"python": "3.12.1", "torch": "2.13.0"})


def hosts_with(number: int, **different: object) -> list[HostInfo]:
    """A reference host, and some that differ from it in these fields."""
    return [HOST, *(replace(HOST, name=f"n{rank + 2}", **different) for rank in range(number))]  # type: ignore[arg-type]


def test_host_info_when_collected_then_describes_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    info = collect_host_info(2, use_cpu=True)
    assert (info.folder, info.num_processes, info.device, info.num_devices) == (str(tmp_path), 2, "cpu", 0)
    assert info.versions["python"] == platform.python_version()
    assert {"torch", "transformers", "llm"} <= info.versions.keys()
    assert HostInfo(**info.to_json()) == info
    assert find_devices(use_cpu=True) == ("cpu", 0)


def test_hosts_when_equal_then_have_no_problem() -> None:
    hosts = hosts_with(3)
    assert (version_mismatch(hosts), folder_mismatch(hosts), device_problem(hosts)) == (None, None, None)


def test_versions_when_one_host_differs_then_the_line_names_hosts_and_versions() -> None:
    hosts = [*hosts_with(2), replace(HOST, name="n4", versions={**HOST.versions, "torch": "2.9.1"})]
    assert version_mismatch(hosts) == (
        "torch is 2.13.0 on n1, n2, n3 and 2.9.1 on n4: install the same version on all hosts, or share one environment"
    )
    assert "torch is 2.13.0 on n1 and missing on n2" in str(
        version_mismatch(hosts_with(1, versions={"python": "3.12.1"}))
    )


def test_folder_when_one_host_has_another_then_the_line_names_both() -> None:
    assert "the folder is /work on n1 and /home/me on n2: " in str(folder_mismatch(hosts_with(1, folder="/home/me")))


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (hosts_with(1, num_devices=3), "the devices are 4 x cuda on n1 and 3 x cuda on n2"),
        (hosts_with(1, device="cpu", num_devices=0), "the devices are 4 x cuda on n1 and cpu on n2"),
        (hosts_with(1, num_processes=2), "the number of processes is 4 on n1 and 2 on n2"),
        ([replace(HOST, num_processes=8)], "8 processes cannot share 4 devices: set --nproc 4"),
    ],
)
def test_devices_when_they_do_not_fit_then_the_line_names_the_hosts(hosts: list[HostInfo], message: str) -> None:
    assert message in str(device_problem(hosts))


def test_names_when_there_are_many_then_four_are_listed() -> None:
    assert format_names([f"n{number}" for number in range(9)]) == "n0, n1, n2, n3 and 5 more"


def test_groups_when_values_repeat_then_the_most_frequent_value_comes_first() -> None:
    pairs = [("2.9", "n1"), ("2.13", "n2"), ("2.13", "n3")]
    assert list(group_hosts(pairs).items()) == [("2.13", ["n2", "n3"]), ("2.9", ["n1"])]
