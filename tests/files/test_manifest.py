"""The manifest finds every kind of damage, in every file, itself included."""

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
    """Whether damage to one file is said in one line that names it; the file is as before afterwards."""
    whole = path.read_bytes()
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    said = find_damage(folder)
    path.write_bytes(whole)
    return said is not None and said.startswith(f"{path.name} ") and "\n" not in said and len(said) < 150


def test_folder_when_untouched_then_is_good(folder: Path) -> None:
    assert find_damage(folder) is None
    assert find_damage(folder, read_content=False) is None
    assert set(json.loads((folder / MANIFEST).read_text())["files"]) == {
        "weights.safetensors",
        "inner/state.json",
        "empty",
    }


def test_bit_when_any_is_flipped_then_is_found(checkpoint: Path) -> None:
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


def test_manifest_when_any_of_its_bits_is_flipped_then_is_found(folder: Path) -> None:
    path = folder / MANIFEST
    whole = path.read_bytes()
    missed = []
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        if not str(find_damage(folder, read_content=False)).startswith(f"{MANIFEST} "):
            missed.append(bit)
    assert missed == []


@pytest.mark.parametrize("read_content", [True, False])
def test_file_when_any_is_missing_cut_emptied_or_longer_then_is_found(checkpoint: Path, read_content: bool) -> None:
    for path in files_of(checkpoint):
        whole = path.read_bytes()
        for changed in (None, whole[:-1], whole[: len(whole) // 2], b"", whole + b"\n"):
            assert is_found(checkpoint, path, changed), (path.name, changed and len(changed))
    assert find_damage(checkpoint, read_content=read_content) is None


def test_folder_when_a_file_is_short_or_long_then_says_both_sizes(folder: Path) -> None:
    path = folder / "weights.safetensors"
    for data in (path.read_bytes()[:-1], path.read_bytes() + b"0"):
        path.write_bytes(data)
        for read_content in (True, False):
            said = find_damage(folder, read_content=read_content)
            assert said == f"weights.safetensors has {len(data)} bytes instead of 1280000"
        path.write_bytes(bytes(range(256)) * 5000)


def test_content_when_not_read_then_only_names_and_sizes_count(folder: Path) -> None:
    (folder / "inner" / "state.json").write_text("[]")
    assert find_damage(folder, read_content=False) is None
    assert find_damage(folder) == "inner/state.json has other content than when it was written"


def test_folder_when_a_file_is_missing_then_names_it(folder: Path) -> None:
    (folder / "inner" / "state.json").unlink()
    assert find_damage(folder) == "inner/state.json is missing"


def test_folder_when_a_file_became_a_folder_then_is_damaged(folder: Path) -> None:
    (folder / "empty").unlink()
    (folder / "empty").mkdir()
    assert find_damage(folder) == "empty is missing"


def test_folder_when_there_is_one_file_more_then_is_good(folder: Path) -> None:
    (folder / "note.txt").write_text("the good one")
    assert find_damage(folder) is None


def test_file_when_the_disk_does_not_give_it_then_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llm.files.manifest

    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(llm.files.manifest, "hash_file", broken)
    assert find_damage(folder) == "empty cannot be read (Input/output error)"


def test_manifest_when_missing_then_says_so(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert find_damage(folder) == f"{MANIFEST} is missing"


def test_manifest_when_it_became_a_folder_then_cannot_be_read(folder: Path) -> None:
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
def test_manifest_when_it_is_none_then_is_one_line(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    said = str(find_damage(folder))
    assert said.startswith((f"{MANIFEST} cannot be read", f"{MANIFEST} has other content"))
    assert len(said) < 150


def test_names_when_not_ascii_then_are_found_again(tmp_path: Path) -> None:
    (tmp_path / "größe.txt").touch()
    (tmp_path / os.fsdecode(b"\xff.bin")).touch()
    write_manifest(tmp_path)
    assert find_damage(tmp_path) is None


def test_hash_when_known_then_is_xxh3(tmp_path: Path) -> None:
    # Source: XXH3_128bits of nothing and seed 0, as `xxh128sum < /dev/null` prints it.
    (tmp_path / "empty").touch()
    assert hash_file(tmp_path / "empty") == "99aa06d3014798d86001c324468d497f"
