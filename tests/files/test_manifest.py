"""The manifest finds every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm.files.manifest import NAME, damage, hash_of, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three files, one of them below another folder and one of them empty."""
    path = tmp_path / "step_1"
    (path / "inner").mkdir(parents=True)
    (path / "weights.safetensors").write_bytes(bytes(range(256)) * 5000)  # more than one piece of reading
    (path / "inner" / "state.json").write_text("{}")
    (path / "empty").touch()
    write_manifest(path)
    return path


def test_folder_when_untouched_then_is_good(folder: Path) -> None:
    assert damage(folder) is None
    assert set(json.loads((folder / NAME).read_text())["files"]) == {
        "weights.safetensors",
        "inner/state.json",
        "empty",
    }


@pytest.mark.parametrize("place", [0, 1 << 20, -1])
def test_folder_when_one_bit_is_flipped_then_names_the_file(folder: Path, place: int) -> None:
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert damage(folder) == "weights.safetensors has other content than when it was written"


def test_folder_when_a_file_is_short_or_long_then_says_both_sizes(folder: Path) -> None:
    path = folder / "weights.safetensors"
    for data in (path.read_bytes()[:-1], path.read_bytes() + b"0"):
        path.write_bytes(data)
        assert damage(folder) == f"weights.safetensors has {len(data)} bytes instead of 1280000"
        path.write_bytes(bytes(range(256)) * 5000)


def test_folder_when_a_file_is_missing_then_names_it(folder: Path) -> None:
    (folder / "inner" / "state.json").unlink()
    assert damage(folder) == "inner/state.json is missing"


def test_folder_when_a_file_became_a_folder_then_is_damaged(folder: Path) -> None:
    (folder / "empty").unlink()
    (folder / "empty").mkdir()
    assert damage(folder) == "empty is missing"


def test_manifest_when_missing_then_says_so(folder: Path) -> None:
    (folder / NAME).unlink()
    assert damage(folder) == f"{NAME} is missing"


@pytest.mark.parametrize(
    "content",
    ["", '{"version": 1, "files": {"empty"', "[]", '{"files": 3}', '{"files": {"empty": {}}}', '{"version": 1}'],
)
def test_manifest_when_it_is_none_then_is_damaged(folder: Path, content: str) -> None:
    (folder / NAME).write_text(content)
    assert str(damage(folder)).startswith(f"{NAME} cannot be read")


def test_hash_when_of_nothing_then_is_blake2b_of_nothing(folder: Path) -> None:
    # Source: RFC 7693's BLAKE2b with a digest of 16 bytes, as b2sum -l 128 < /dev/null prints it.
    assert hash_of(folder / "empty") == "cae66941d9efbd404e4d88758ea67670"
