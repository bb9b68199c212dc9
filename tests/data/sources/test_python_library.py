"""Source code of the standard library as text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from llm.config.errors import UserError
from llm.data.sources import python_library as library


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    for number in range(200):
        (tmp_path / f"m{number}.py").write_text(f"x = {number}\n")
    for name in ("test/t.py", "a/tests/t.py", "site-packages/s.py", "idlelib/idle_test/i.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("left out")
    (tmp_path / "a" / "kept.py").write_text("kept")
    (tmp_path / "data.txt").write_text("left out")
    monkeypatch.setattr(library.sysconfig, "get_path", lambda _: str(tmp_path))
    return tmp_path


def test_open_python_library_when_split_then_each_source_file_in_one_split(root: Path) -> None:
    train, validation = library.open_python_library(10)
    assert validation is not None
    assert sorted(train.names + validation.names) == sorted(["a/kept.py", *(f"m{number}.py" for number in range(200))])
    assert list(train.names) == sorted(train.names)
    assert 8 <= len(validation.names) <= 35


def test_open_python_library_when_files_are_added_and_removed_then_others_stay_in_their_split(root: Path) -> None:
    _, before = library.open_python_library(10)
    (root / "new.py").write_text("new")
    (root / "m7.py").unlink()
    _, after = library.open_python_library(10)
    assert set(before.names) - {"m7.py"} == set(after.names) - {"new.py"}


def test_open_python_library_when_percentage_is_zero_or_tiny_then_no_or_one_validation_file(root: Path) -> None:
    assert library.open_python_library(0)[1] is None
    assert len(library.open_python_library(1e-9)[1].names) == 1


def test_open_python_library_when_a_file_is_not_utf8_or_empty_then_counted_as_skipped(root: Path) -> None:
    (root / "m0.py").write_bytes(b"\xff")
    (root / "m1.py").write_bytes(b"")
    skipped: Counter[str] = Counter()
    chunks = list(library.open_python_library(0)[0](skipped))
    assert len(chunks) == 199
    assert all(chunk.ends for chunk in chunks)
    assert skipped == {"file not UTF-8": 1, "empty file": 1}


def test_open_python_library_when_a_file_changes_then_identity_changes(root: Path) -> None:
    before = library.open_python_library(0)[0].identity
    (root / "m0.py").write_text("longer than it was\n")
    assert library.open_python_library(0)[0].identity != before


def test_open_python_library_when_there_is_no_source_code_then_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(library.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match="no Python source"):
        library.open_python_library(5)


def test_open_python_library_when_it_is_the_real_one_then_hundreds_of_files() -> None:
    train, validation = library.open_python_library(5)
    assert len(train.names) > 300
    assert 0.01 < len(validation.names) / len(train.names) < 0.1
    assert not any("test" in name.split("/")[:-1] for name in train.names)
