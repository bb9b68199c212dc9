"""The text of a run, from the options."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from llm.config.errors import UsageError, UserError
from llm.config.options import DataOptions
from llm.data.sources.corpus import Corpus, open_corpus


def _texts(corpus: Corpus) -> dict[str, str]:
    texts = {"train": "", "validation": ""}
    for split, chunk in corpus.chunks(Counter()):
        texts[split] += chunk.text + ("|" if chunk.ends else "")
    return texts


def _error(**options: object) -> str:
    with pytest.raises(UserError) as caught:
        open_corpus(DataOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 10)
    return path


def test_corpus_when_nothing_named_then_python_library(caplog) -> None:
    caplog.set_level("INFO")
    corpus = open_corpus(DataOptions())
    assert corpus.name == "builtin:python"
    assert "no data named: training on builtin:python" in caplog.text
    assert "def " in next(corpus.texts())
    assert corpus.fingerprint == open_corpus(DataOptions(dataset_name="builtin:python")).fingerprint


def test_corpus_when_one_file_then_its_end_is_held_out(text: Path) -> None:
    corpus = open_corpus(DataOptions(train_file=(str(text),), validation_split_percentage=10))
    assert _texts(corpus) == {"train": "0123456789" * 9, "validation": "0123456789|"}
    assert "".join(corpus.texts()) == "0123456789" * 9


def test_corpus_when_percentage_is_zero_then_all_for_training(text: Path) -> None:
    corpus = open_corpus(DataOptions(train_file=(str(text),), validation_split_percentage=0))
    assert _texts(corpus) == {"train": "0123456789" * 10 + "|", "validation": ""}


def test_corpus_when_validation_file_then_nothing_held_out(text: Path, tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_text('{"text": "v"}\n{"text": "w"}\n')
    corpus = open_corpus(DataOptions(train_file=(str(text),), validation_file=(str(tmp_path / "v.jsonl"),)))
    assert _texts(corpus) == {"train": "0123456789" * 10 + "|", "validation": "v|w|"}


def test_corpus_when_validation_file_is_a_training_file_then_warning(text: Path, caplog) -> None:
    open_corpus(DataOptions(train_file=(str(text),), validation_file=(str(text),)))
    assert "also training files" in caplog.text


def test_corpus_when_only_validation_file_then_usage_error(text: Path) -> None:
    with pytest.raises(UsageError, match="--train_file"):
        open_corpus(DataOptions(validation_file=(str(text),)))


def test_corpus_when_dataset_and_files_are_named_then_dataset_with_warning(text: Path, caplog) -> None:
    corpus = open_corpus(DataOptions(dataset_name="builtin:python", train_file=(str(text),)))
    assert corpus.name == "builtin:python"
    assert "--train_file and --validation_file are not" in caplog.text


def test_corpus_when_folder_then_its_files(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("training")
    (tmp_path / "validation.txt").write_text("validation")
    corpus = open_corpus(DataOptions(dataset_name=str(tmp_path)))
    assert _texts(corpus) == {"train": "training|", "validation": "validation|"}


def test_corpus_when_name_is_not_a_text_then_error_names_the_fix(text: Path) -> None:
    assert "there is builtin:python" in _error(dataset_name="builtin:pyhton")
    assert "give it as --train_file" in _error(dataset_name=str(text))
    assert "no such folder" in _error(dataset_name="./not/here")


def test_corpus_when_all_rows_are_skipped_then_error_names_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    corpus = open_corpus(DataOptions(train_file=(str(tmp_path / "a.jsonl"),)))
    with pytest.raises(UserError, match=r"holds no text \(skipped 2 rows \(empty: 1, null: 1\)\)"):
        list(corpus.chunks(Counter()))


def test_fingerprint_when_text_or_its_options_change_then_changes(text: Path) -> None:
    def fingerprint(**options: object) -> str:
        return open_corpus(DataOptions(train_file=(str(text),), **options)).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    assert fingerprint(block_size=64, dataloader_num_workers=2) == before
    assert fingerprint(no_keep_linebreaks=True) != before
    assert fingerprint(validation_split_percentage=7) != before
    text.write_text("another text")
    assert fingerprint() != before
