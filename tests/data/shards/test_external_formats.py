"""Token files of other programs, written here as their programs document it."""

from __future__ import annotations

import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest

from llm.config.errors import UserError
from llm.data.shards.external_formats import open_external_folder, open_file, open_files
from llm.data.shards.format import TruncatedShardError, UnknownFormatError

IDS = np.random.default_rng(0).integers(0, 50_000, 5_000)


def write_nanogpt(path: Path, ids: np.ndarray) -> None:
    """Prepare.py of nanoGPT: an array of uint16, tofile."""
    ids.astype(np.uint16).tofile(path)


def write_llm_c(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> None:
    """Write_datafile of llm.c and modded-nanogpt: 256 int32, then the ids."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())


def write_npy(path: Path, ids: np.ndarray) -> None:
    """Write_datafile of build-nanogpt: np.save of uint16."""
    np.save(path, ids.astype(np.uint16))


WRITERS = {
    "nanogpt.bin": write_nanogpt,
    "llm_c.bin": write_llm_c,
    "llm_c_llama3.bin": lambda path, ids: write_llm_c(path, ids + 100_000, 20240801, 7, "<u4"),
    "build.npy": write_npy,
}


@pytest.mark.parametrize("name", WRITERS)
def test_open_file_when_written_in_its_format_then_the_same_ids(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, IDS)
    streams = open_files([str(tmp_path / name)], None, 10, 200_000)
    assert streams.validation is not None
    content = np.concatenate([streams.train.tokens[:], streams.validation.tokens[:]])
    assert content.tolist() == (IDS + (100_000 if "llama" in name else 0)).tolist()
    assert len(streams.validation.tokens) == 500
    assert pickle.loads(pickle.dumps(streams.train.tokens))[5:9].tolist() == content[5:9].tolist()


@pytest.mark.parametrize(
    ("train", "validation", "writer"),
    [
        (["train.bin"], ["val.bin"], write_nanogpt),
        (["fineweb_train_000001.bin", "fineweb_train_000002.bin"], ["fineweb_val_000000.bin"], write_llm_c),
        (["edufineweb_train_000001.npy", "edufineweb_train_000002.npy"], ["edufineweb_val_000000.npy"], write_npy),
    ],
)
def test_open_external_folder_when_files_name_their_split_then_both(tmp_path: Path, train, validation, writer) -> None:  # type: ignore[no-untyped-def]
    for part, name in zip(np.array_split(IDS, len(train)), train, strict=True):
        writer(tmp_path / name, part)
    for name in validation:
        writer(tmp_path / name, IDS[:100])
    (tmp_path / "meta.pkl").write_bytes(b"?")
    streams = open_external_folder(tmp_path, 5, 50_000)
    assert streams.validation is not None
    assert streams.train.tokens[:].tolist() == IDS.tolist()
    assert streams.validation.tokens[:].tolist() == IDS[:100].tolist()


@pytest.mark.parametrize("with_splits", [False, True])
def test_open_external_folder_when_saved_with_input_ids_then_rows_are_concatenated(
    tmp_path: Path, with_splits: bool
) -> None:
    rows = [part.tolist() for part in np.array_split(IDS, 37)]
    table = datasets.Dataset.from_dict({"input_ids": rows, "n": list(range(37))})
    held_out = datasets.Dataset.from_dict({"input_ids": rows[:2]})
    folder = tmp_path / "saved"
    (datasets.DatasetDict(train=table, validation=held_out) if with_splits else table).save_to_disk(folder)
    streams = open_external_folder(folder, 0, 50_000)
    assert streams.train.tokens[:].tolist() == IDS.tolist()
    assert pickle.loads(pickle.dumps(streams.train.tokens))[30:60].tolist() == IDS[30:60].tolist()
    assert (streams.validation is not None) == with_splits
    if streams.validation is not None:
        assert streams.validation.tokens[:].tolist() == rows[0] + rows[1]


def test_open_file_when_damaged_or_unknown_then_named(tmp_path: Path) -> None:
    write_llm_c(tmp_path / "short.bin", IDS)
    (tmp_path / "short.bin").write_bytes((tmp_path / "short.bin").read_bytes()[:-2])
    with pytest.raises(TruncatedShardError, match=r"short\.bin: has 11022 bytes, 11024 bytes are expected"):
        open_file(tmp_path / "short.bin")
    write_llm_c(tmp_path / "new.bin", IDS, version=2)
    with pytest.raises(UnknownFormatError, match="version 2 of llm"):
        open_file(tmp_path / "new.bin")
    (tmp_path / "odd.bin").write_bytes(b"123")
    with pytest.raises(TruncatedShardError, match="no uint16"):
        open_file(tmp_path / "odd.bin")
    write_npy(tmp_path / "cut.npy", IDS)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-2])
    np.save(tmp_path / "float.npy", np.zeros(3))
    for name in ("cut.npy", "float.npy"):
        with pytest.raises(UnknownFormatError, match=name):
            open_file(tmp_path / name)


def test_open_external_folder_when_it_holds_no_tokens_then_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="holds no token shards"):
        open_external_folder(tmp_path, 5, 100)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(UnknownFormatError, match="no column input_ids; its columns are text"):
        open_external_folder(tmp_path / "text", 5, 100)


def test_open_files_when_a_file_changes_then_the_hash_changes(tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "a.bin", IDS)
    one = open_files([str(tmp_path / "a.bin")], None, 5, 50_000).data_hash
    assert open_files([str(tmp_path / "a.bin")], None, 5, 50_000).data_hash == one
    write_nanogpt(tmp_path / "a.bin", IDS + 1)
    assert open_files([str(tmp_path / "a.bin")], None, 5, 50_000).data_hash != one


def test_open_files_when_missing_then_the_nearest_name(tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "train.bin", IDS)
    with pytest.raises(UserError, match=r"nearest name in .* is train\.bin"):
        open_files([str(tmp_path / "trian.bin")], None, 5, 50_000)
