"""The record of what the shards of a folder are made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm.config.errors import UserError
from llm.data.preparation.job_record import JOB_FILE, claim_folder

SETTINGS = {"text": "a.txt", "fingerprint": "abc", "tokenizer": "gpt2", "vocab_size": None, "shard_size": 100}


def test_claim_folder_when_empty_then_records_the_version_and_all_settings(tmp_path: Path) -> None:
    claim_folder(tmp_path, SETTINGS)
    assert json.loads((tmp_path / JOB_FILE).read_text()) == {"version": 3, **SETTINGS}


def test_claim_folder_when_claimed_with_the_same_settings_then_keeps_the_shards_and_removes_leftovers(
    tmp_path: Path,
) -> None:
    claim_folder(tmp_path, SETTINGS)
    record = (tmp_path / JOB_FILE).read_bytes()
    (tmp_path / "train_00000.bin").write_bytes(b"12")
    (tmp_path / ".prepare.json.7.tmp").touch()
    (tmp_path / ".tokenizer.7.tmp").mkdir()
    (tmp_path / ".bashrc.old").touch()
    claim_folder(tmp_path, SETTINGS)
    assert (tmp_path / JOB_FILE).read_bytes() == record
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bashrc.old", JOB_FILE, "train_00000.bin"]


def test_claim_folder_when_shards_have_other_settings_then_refused(tmp_path: Path) -> None:
    claim_folder(tmp_path, SETTINGS)
    (tmp_path / "train_00000.bin").write_bytes(b"12")
    with pytest.raises(UserError, match=r"begun with another content of the text and another shard_size; "):
        claim_folder(tmp_path, {**SETTINGS, "fingerprint": "def", "shard_size": 200})
    (tmp_path / JOB_FILE).write_text('{"version": 2}')
    with pytest.raises(UserError, match=r"begun with another version of this program and another text"):
        claim_folder(tmp_path, SETTINGS)


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_claim_folder_when_the_record_is_broken_then_refused_only_with_shards(content: str, tmp_path: Path) -> None:
    (tmp_path / JOB_FILE).write_text(content)
    (tmp_path / "train_00000.bin").write_bytes(b"12")
    with pytest.raises(UserError, match=f"{JOB_FILE} is broken"):
        claim_folder(tmp_path, SETTINGS)
    (tmp_path / "train_00000.bin").unlink()
    claim_folder(tmp_path, SETTINGS)
    assert json.loads((tmp_path / JOB_FILE).read_text())["text"] == "a.txt"


def test_claim_folder_when_no_shard_was_written_then_other_settings_replace_the_record_and_the_tokenizer(
    tmp_path: Path,
) -> None:
    claim_folder(tmp_path, SETTINGS)
    (tmp_path / "tokenizer").mkdir()
    claim_folder(tmp_path, {**SETTINGS, "tokenizer": "char"})
    assert json.loads((tmp_path / JOB_FILE).read_text())["tokenizer"] == "char"
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("name", ["train.bin", "data.json", "ids.npy"])
def test_claim_folder_when_it_holds_files_of_something_else_then_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"holds {name}, but no {JOB_FILE}"):
        claim_folder(tmp_path, SETTINGS)
    assert not (tmp_path / JOB_FILE).exists()
