"""Datasets of the Hub and saved datasets, without the Hub."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from llm.config.errors import UserError
from llm.config.options import DataOptions
from llm.data.sources.corpus import Corpus, open_corpus
from llm.data.sources.hub_datasets import load_hub


def _table(*texts: object, column: str = "text") -> datasets.Dataset:
    return datasets.Dataset.from_dict({column: list(texts), "n": list(range(len(texts)))})


def _texts(corpus: Corpus, split: str) -> str:
    chunks = corpus.chunks(Counter())
    return "".join(chunk.text + ("|" if chunk.ends else "") for name, chunk in chunks if name == split)


def _open(splits: dict, **options: object) -> Corpus:
    return open_corpus(DataOptions(dataset_name="some/set", **options), load_hub=lambda *_: splits)


def test_corpus_when_dataset_has_validation_then_it_is_used() -> None:
    corpus = _open({"train": _table("a", "b", None), "validation": _table("c"), "test": _table("d")})
    assert _texts(corpus, "train") == "a|b|"
    assert _texts(corpus, "validation") == "c|"


def test_corpus_when_dataset_has_no_validation_then_its_end_is_held_out() -> None:
    corpus = _open({"train": _table(*"abcdefghij")}, validation_split_percentage=20)
    assert _texts(corpus, "train") == "a|b|c|d|e|f|g|h|"
    assert _texts(corpus, "validation") == "i|j|"


def test_corpus_when_rows_are_lines_then_one_document() -> None:
    corpus = _open({"train": _table("", " = A = \n", "", "b\n"), "validation": _table("c\n")})
    assert _texts(corpus, "train") == " = A = \nb\n|"


def test_corpus_when_dataset_lacks_the_column_then_error_lists_columns() -> None:
    splits = {"train": _table("a", column="body")}
    with pytest.raises(UserError, match="some/set: no column 'text'; its columns are body, n;"):
        _open(splits)
    assert _texts(_open(splits, text_column="body", validation_split_percentage=0), "train") == "a|"


def test_corpus_when_dataset_has_no_train_split_then_error_lists_splits() -> None:
    with pytest.raises(UserError, match="no split called train; it has test"):
        _open({"test": _table("a")})


def test_corpus_when_dataset_changes_then_fingerprint_changes() -> None:
    one, other = _table("a", "b"), _table("a", "c")
    assert _open({"train": one}).fingerprint == _open({"train": one}).fingerprint
    assert _open({"train": one}).fingerprint != _open({"train": other}).fingerprint


@pytest.mark.parametrize("with_splits", [False, True])
def test_corpus_when_folder_was_saved_to_disk_then_loaded(tmp_path: Path, with_splits: bool) -> None:
    table = _table("a", "b")
    if with_splits:
        datasets.DatasetDict(train=table, validation=_table("c")).save_to_disk(tmp_path / "set")
    else:
        table.save_to_disk(tmp_path / "set")
    corpus = open_corpus(DataOptions(dataset_name=str(tmp_path / "set")))
    assert _texts(corpus, "train") == ("a|b|" if with_splits else "a|")
    assert _texts(corpus, "validation") == ("c|" if with_splits else "b|")


def test_corpus_when_saved_folder_is_damaged_then_error(tmp_path: Path) -> None:
    _table("a").save_to_disk(tmp_path / "set")
    next((tmp_path / "set").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        open_corpus(DataOptions(dataset_name=str(tmp_path / "set")))
    assert "\n" not in str(caught.value)


def _error(monkeypatch, error: Exception, configuration: str | None = None) -> str:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as caught:
        load_hub("some/set", configuration)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_load_hub_when_dataset_does_not_exist_then_error_names_cause_and_fix(monkeypatch) -> None:
    message = _error(monkeypatch, DatasetNotFoundError("Dataset 'some/set' doesn't exist."))
    assert message.startswith("--dataset_name some/set: cannot be loaded (Dataset 'some/set'")
    assert "check the spelling" in message


def test_load_hub_when_hub_is_unreachable_then_error_names_the_fix(monkeypatch) -> None:
    message = _error(monkeypatch, ConnectionError("Couldn't reach the Hub"))
    assert "connect this machine" in message


def test_load_hub_when_generation_fails_then_error_names_the_root_cause(monkeypatch) -> None:
    error = DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = ValueError("JSON parse error in row 3\nmore")
    assert "(JSON parse error in row 3)" in _error(monkeypatch, error)


@pytest.mark.parametrize(
    "message",
    [
        "BuilderConfig 'x' not found. Available: ['a', 'b']",
        "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample",
        "Couldn't find cache for s for config 'x'\nAvailable configs in the cache: ['a', 'b']",
    ],
)
def test_load_hub_when_configuration_is_unknown_then_error_lists_configurations(monkeypatch, message: str) -> None:
    text = _error(monkeypatch, ValueError(message), "x")
    assert text == "--dataset_config_name x: some/set has no such configuration; it has a, b"
    assert _error(monkeypatch, ValueError(message)).endswith("--dataset_config_name: a, b")
