"""Atomic writes: the old content or the new one, never a part."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm.files.atomic import atomic_folder, restore_replaced, sync_tree, write_bytes, write_text


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_write_when_the_file_exists_then_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_text(path, "old, and longer")
    write_text(path, "né")
    assert path.read_bytes() == b"n\xc3\xa9"
    assert os.listdir(tmp_path) == ["status.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_when_it_fails_then_the_old_content_stays_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "status.json"
    write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left") as error:
        write_bytes(path, b"new")
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["status.json"]


def test_write_when_done_then_the_file_has_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "a", "a")
    assert mode(tmp_path / "a") == 0o666 & ~umask


def test_atomic_folder_when_the_block_ends_then_is_complete_and_has_the_modes_of_the_umask(
    tmp_path: Path, umask: int
) -> None:
    path = tmp_path / "deep" / "step_1"
    with atomic_folder(path) as temporary:
        assert not path.exists()
        (temporary / "inner").mkdir()
        for file in (temporary / "weights", temporary / "inner" / "more"):
            file.touch(mode=0o600)  # as safetensors leaves its files
    assert mode(path) == mode(path / "inner") == 0o777 & ~umask
    assert mode(path / "weights") == mode(path / "inner" / "more") == 0o666 & ~umask
    assert os.listdir(tmp_path / "deep") == ["step_1"]


def test_atomic_folder_when_there_was_an_older_one_then_replaces_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "step_1"
    for name in ("old", "new"):
        with atomic_folder(path) as temporary:
            (temporary / name).write_text(name)
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["step_1"]


def test_atomic_folder_when_the_block_fails_then_the_old_one_stays_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "step_1"
    with atomic_folder(path) as temporary:
        (temporary / "old").write_text("old")

    def interrupted() -> None:
        with atomic_folder(path) as temporary:
            (temporary / "half").write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(path) == ["old"]
    assert os.listdir(tmp_path) == ["step_1"]


@pytest.mark.parametrize("is_killed", [False, True])
def test_atomic_folder_when_interrupted_between_two_renames_then_the_old_one_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    path, replace = tmp_path / "step_1", os.replace
    with atomic_folder(path) as temporary:
        (temporary / "old").write_text("old")

    def fail(source: Path, target: Path) -> None:
        if target == path and ".tmp" in source.name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        if is_killed:  # then no cleanup runs
            patch.setattr("llm.files.atomic._restore", lambda *_: None)
            patch.setattr("llm.files.atomic.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(OSError, match="No space left"), atomic_folder(path) as temporary:
            (temporary / "new").write_text("new")
    assert path.exists() is not is_killed
    restore_replaced(tmp_path, "step_*")
    assert os.listdir(path) == ["old"]
    with atomic_folder(path) as temporary:
        (temporary / "new").write_text("new")
    restore_replaced(tmp_path, "step_*")
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["step_1"]


def test_atomic_folder_when_an_earlier_attempt_left_files_then_they_are_removed(tmp_path: Path) -> None:
    left = tmp_path / f".step_1.{os.getpid()}.tmp"
    left.mkdir()
    (left / "left").write_text("")
    with atomic_folder(tmp_path / "step_1") as temporary:
        (temporary / "new").write_text("")
    assert os.listdir(tmp_path / "step_1") == ["new"]


def test_sync_tree_when_called_then_syncs_every_file_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    for file in (tmp_path / "a", tmp_path / "inner" / "b"):
        file.write_text("")
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    sync_tree(tmp_path)
    assert synced == {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))}
