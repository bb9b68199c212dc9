"""Folders of this process's control groups, in both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm.system import cgroups
from llm.system.cgroups import cgroup_dirs, read_text


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    monkeypatch.setattr(cgroups, "PROC", tmp_path / "proc")
    monkeypatch.setattr(cgroups, "_CGROUPS", tmp_path / "cgroup")
    return tmp_path


def list_dirs(root: Path, lines: str, controller: str) -> list[str]:
    (root / "proc/self/cgroup").write_text(lines)
    return [folder.relative_to(root).as_posix() for folder in cgroup_dirs(controller)]


@pytest.mark.parametrize("controller", ["cpu", "memory"])
def test_cgroup_dirs_when_of_version_2_then_the_cgroup_and_all_above_it(root: Path, controller: str) -> None:
    assert list_dirs(root, "0::/a/b\n", controller) == ["cgroup/a/b", "cgroup/a", "cgroup"]
    assert list_dirs(root, "0::/\n", controller) == ["cgroup"]


def test_cgroup_dirs_when_of_version_1_then_only_the_hierarchy_of_the_controller(root: Path) -> None:
    lines = "5:memory:/m\n4:cpu,cpuacct:/c\n3:cpuset:/s\n"
    assert list_dirs(root, lines, "cpu") == ["cgroup/cpu,cpuacct/c", "cgroup/cpu,cpuacct"]
    assert list_dirs(root, lines, "memory") == ["cgroup/memory/m", "cgroup/memory"]


def test_cgroup_dirs_when_there_is_no_proc_then_none(root: Path) -> None:
    assert list(cgroup_dirs("cpu")) == []


def test_read_text_when_the_file_cannot_be_read_then_is_empty(root: Path) -> None:
    assert read_text(root / "missing") == ""
    assert read_text(root) == ""
    (root / "latin1").write_bytes(b"caf\xe9")
    assert read_text(root / "latin1") == "caf\N{REPLACEMENT CHARACTER}"
