"""Names, globs and folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm.config.errors import UserError
from llm.data.sources.files import file_kind, find_split_files, resolve_files


def _write(folder: Path, *names: str, text: str = "text") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _names(files) -> list[str]:
    return [file.path.name for file in files]


def _error(pattern: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_files([pattern], "--train_file")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_resolve_files_when_names_and_globs_overlap_then_each_file_once(tmp_path: Path) -> None:
    _write(tmp_path, "b.txt", "a.txt", "c.md")
    files = resolve_files([f"{tmp_path}/c.md", f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"], "--f")
    assert _names(files) == ["c.md", "a.txt", "b.txt"]


def test_resolve_files_when_file_name_looks_like_a_glob_then_that_file(tmp_path: Path) -> None:
    _write(tmp_path, "a[1].txt", "a1.txt")
    assert _names(resolve_files([f"{tmp_path}/a[1].txt"], "--f")) == ["a[1].txt"]


def test_resolve_files_when_glob_crosses_folders_then_all_found(tmp_path: Path) -> None:
    _write(tmp_path, "x/y/a.txt", "x/b.txt")
    assert sorted(_names(resolve_files([f"{tmp_path}/**/*.txt"], "--f"))) == ["a.txt", "b.txt"]


def test_resolve_files_when_missing_then_nearest_name(tmp_path: Path) -> None:
    _write(tmp_path, "tinyshakespeare.txt")
    message = _error(f"{tmp_path}/tinyshakespear.txt")
    assert "no such file" in message
    assert message.endswith("is tinyshakespeare.txt")


def test_resolve_files_when_folder_missing_then_nearest_folder(tmp_path: Path) -> None:
    _write(tmp_path, "corpora/a.txt")
    assert _error(f"{tmp_path}/corpra/a.txt").endswith(f"the nearest name in {tmp_path} is corpora")


def test_resolve_files_when_glob_matches_nothing_then_nearest_name(tmp_path: Path) -> None:
    _write(tmp_path, "part-1.txt")
    message = _error(f"{tmp_path}/prt-*.txt")
    assert "no file matches" in message
    assert "part-1.txt" in message


def test_resolve_files_when_folder_then_error(tmp_path: Path) -> None:
    assert "is a folder" in _error(str(tmp_path))


def test_resolve_files_when_empty_then_error(tmp_path: Path) -> None:
    _write(tmp_path, "a.txt", text="")
    assert "is empty" in _error(f"{tmp_path}/a.txt")


def test_resolve_files_when_glob_matches_an_empty_file_then_left_out_with_warning(tmp_path: Path, caplog) -> None:
    _write(tmp_path, "a.txt", text="")
    _write(tmp_path, "b.txt")
    assert _names(resolve_files([f"{tmp_path}/*.txt"], "--f")) == ["b.txt"]
    assert "left out 1 empty files" in caplog.text


def test_resolve_files_when_ending_is_unknown_then_error_lists_known_endings(tmp_path: Path) -> None:
    _write(tmp_path, "a.docx")
    message = _error(f"{tmp_path}/a.docx")
    assert ".txt, .md, .csv, .tsv, .json, .jsonl, .parquet" in message


def test_resolve_files_when_file_is_not_readable_then_error(tmp_path: Path, monkeypatch) -> None:
    _write(tmp_path, "a.txt")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "no permission" in _error(f"{tmp_path}/a.txt")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", ("txt", None)),
        ("A.B.JSONL.GZ", ("jsonl", "gz")),
        ("a.csv.zst", ("csv", "zst")),
        ("a.gz", None),
        ("a.parquet.gz", None),
        ("txt", None),
    ],
)
def test_file_kind_when_name_has_endings_then_kind_and_compression(name: str, kind) -> None:
    assert file_kind(Path(name)) == kind


def test_find_split_files_when_names_contain_splits_then_files_by_split(tmp_path: Path) -> None:
    _write(tmp_path, "data/train-00000.txt", "data/validation-00000.txt", "test/a.txt", "README.md")
    _write(tmp_path, "latest.txt", ".hidden.txt", ".git/x.txt")
    splits = find_split_files(tmp_path)
    assert _names(splits["train"]) == ["train-00000.txt"]
    assert _names(splits["validation"]) == ["validation-00000.txt"]


def test_find_split_files_when_no_split_named_then_all_are_for_training(tmp_path: Path) -> None:
    _write(tmp_path, "b.txt", "a.md", "deep/c.jsonl", "picture.png", "contest.txt")
    splits = find_split_files(tmp_path)
    assert _names(splits["train"]) == ["a.md", "b.txt", "contest.txt", "c.jsonl"]
    assert splits["validation"] == ()


def test_find_split_files_when_only_validation_is_named_then_other_files_are_for_training(tmp_path: Path) -> None:
    _write(tmp_path, "dev.txt", "book.txt")
    splits = find_split_files(tmp_path)
    assert (_names(splits["train"]), _names(splits["validation"])) == (["book.txt"], ["dev.txt"])


def test_find_split_files_when_parent_is_called_train_then_it_does_not_count(tmp_path: Path) -> None:
    _write(tmp_path, "train/dev.txt", "train/book.txt")
    assert _names(find_split_files(tmp_path / "train")["validation"]) == ["dev.txt"]


def test_find_split_files_when_no_file_has_a_known_ending_then_error(tmp_path: Path) -> None:
    _write(tmp_path, "a.png")
    with pytest.raises(UserError, match="holds no training text"):
        find_split_files(tmp_path)
