"""The manifest reveals every kind of damage, in every file and in itself."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from llm.files.manifest import MANIFEST, find_damage, hash_file, write_manifest

NUM_FLIPS = 100


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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2_dir: Path) -> Path:
    """The files of a real checkpoint, and their manifest."""
    path = tmp_path_factory.mktemp("checkpoints") / "step_7"
    shutil.copytree(tiny_gpt2_dir, path)
    (path / "training_state.json").write_text(
        json.dumps({"version": 1, "step": 7, "progress": {"loss": 3.25}}, indent=1)
    )
    write_manifest(path)
    assert find_damage(path) is None
    return path


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def is_found(folder: Path, path: Path, changed: bytes | None) -> bool:
    """Whether damage to one file is reported in one line that names it; restores the file afterwards."""
    original = path.read_bytes()
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    report = find_damage(folder)
    path.write_bytes(original)
    if report is None:
        return False
    return report.startswith(f"{path.name} ") and "\n" not in report and len(report) < 150


def test_find_damage_when_the_folder_is_untouched_then_finds_none(folder: Path) -> None:
    assert find_damage(folder) is None
    assert find_damage(folder, read_content=False) is None
    assert set(json.loads((folder / MANIFEST).read_text())["files"]) == {
        "weights.safetensors",
        "inner/state.json",
        "empty",
    }


def test_find_damage_when_any_bit_of_a_file_is_flipped_then_finds_it(checkpoint: Path) -> None:
    draw = random.Random(5)
    paths = files_of(checkpoint)
    # Half of them where they fall, which is in the weights; the others in every file in turn.
    sizes = [path.stat().st_size for path in paths]
    chosen = draw.choices(paths, sizes, k=NUM_FLIPS // 2) + [paths[i % len(paths)] for i in range(NUM_FLIPS // 2)]
    assert {path.name for path in chosen} >= {"model.safetensors", "training_state.json", MANIFEST}
    missed = []
    for path in chosen:
        data = bytearray(path.read_bytes())
        bit = draw.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        if not is_found(checkpoint, path, bytes(data)):
            missed.append((path.name, bit))
    assert missed == []
    assert find_damage(checkpoint) is None


def test_find_damage_when_any_bit_of_the_manifest_is_flipped_then_finds_it(folder: Path) -> None:
    path = folder / MANIFEST
    original = path.read_bytes()
    missed = []
    for bit in range(8 * len(original)):
        data = bytearray(original)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        if not str(find_damage(folder, read_content=False)).startswith(f"{MANIFEST} "):
            missed.append(bit)
    assert missed == []


@pytest.mark.parametrize("read_content", [True, False])
def test_find_damage_when_a_file_is_missing_cut_empty_or_longer_then_finds_it(
    checkpoint: Path, read_content: bool
) -> None:
    for path in files_of(checkpoint):
        original = path.read_bytes()
        for changed in (None, original[:-1], original[: len(original) // 2], b"", original + b"\n"):
            assert is_found(checkpoint, path, changed), (path.name, changed and len(changed))
    assert find_damage(checkpoint, read_content=read_content) is None


def test_find_damage_when_a_file_has_another_size_then_names_both_sizes(folder: Path) -> None:
    path = folder / "weights.safetensors"
    for data in (path.read_bytes()[:-1], path.read_bytes() + b"0"):
        path.write_bytes(data)
        for read_content in (True, False):
            report = find_damage(folder, read_content=read_content)
            assert report == f"weights.safetensors has {len(data)} bytes instead of 1280000"
        path.write_bytes(bytes(range(256)) * 5000)


def test_find_damage_when_the_content_is_not_read_then_compares_names_and_sizes(folder: Path) -> None:
    (folder / "inner" / "state.json").write_text("[]")
    assert find_damage(folder, read_content=False) is None
    assert find_damage(folder) == "inner/state.json has other content than when it was written"


def test_find_damage_when_a_file_is_missing_then_names_it(folder: Path) -> None:
    (folder / "inner" / "state.json").unlink()
    assert find_damage(folder) == "inner/state.json is missing"


def test_find_damage_when_a_file_became_a_folder_then_names_it(folder: Path) -> None:
    (folder / "empty").unlink()
    (folder / "empty").mkdir()
    assert find_damage(folder) == "empty is missing"


def test_find_damage_when_there_is_an_additional_file_then_finds_none(folder: Path) -> None:
    (folder / "note.txt").write_text("the good one")
    assert find_damage(folder) is None


def test_find_damage_when_a_file_cannot_be_read_then_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llm.files.manifest

    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(llm.files.manifest, "hash_file", broken)
    assert find_damage(folder) == "empty cannot be read (Input/output error)"


def test_find_damage_when_the_manifest_is_missing_then_names_it(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert find_damage(folder) == f"{MANIFEST} is missing"


def test_find_damage_when_the_manifest_is_a_folder_then_names_it(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()
    assert find_damage(folder) == f"{MANIFEST} cannot be read (Is a directory)"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"version": 1, "files": {"empty"',
        b"[]",
        b"3",
        b'{"files": 3}',
        b'{"files": {"empty": {}}}',
        b'{"version": 1}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"files": {"a": {"bytes": ' + b"9" * 5000 + b"}}}",
        b'{"files": {"a": {"bytes": 1e999}}}',
        b'{"files": "\\ud800"}',
    ],
    ids=lambda content: repr(content[:16]),
)
def test_find_damage_when_the_manifest_has_invalid_content_then_is_one_short_line(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    report = str(find_damage(folder))
    assert report.startswith((f"{MANIFEST} cannot be read", f"{MANIFEST} has other content"))
    assert len(report) < 150


def test_write_manifest_when_names_are_not_ascii_then_find_damage_finds_none(tmp_path: Path) -> None:
    (tmp_path / "größe.txt").touch()
    (tmp_path / os.fsdecode(b"\xff.bin")).touch()
    write_manifest(tmp_path)
    assert find_damage(tmp_path) is None


def test_hash_file_when_the_file_is_empty_then_is_the_published_xxh3_value(tmp_path: Path) -> None:
    # Source: XXH3_128bits of nothing and seed 0, as `xxh128sum < /dev/null` prints it.
    (tmp_path / "empty").touch()
    assert hash_file(tmp_path / "empty") == "99aa06d3014798d86001c324468d497f"
