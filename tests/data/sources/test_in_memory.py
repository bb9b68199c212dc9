"""Test text in memory: strings and datasets as sources of documents."""

from __future__ import annotations

from collections import Counter
from typing import Any

import datasets
import pytest

from llm.config.errors import UsageError, UserError
from llm.config.options import DataOptions
from llm.data.sources.corpus import Corpus
from llm.data.sources.in_memory import corpus_in_memory

OPTIONS = DataOptions()
DOCUMENTS = ["one\n", "two", "drei\n", "vier ü"]


def documents(corpus: Corpus) -> list[tuple[str, str]]:
    """Return split and text of each document."""
    chunks = list(corpus.chunks(Counter()))
    assert all(chunk.ends for _, chunk in chunks)
    return [(split, chunk.text) for split, chunk in chunks]


def test_strings_when_read_then_each_is_one_document_and_the_last_is_held_out() -> None:
    corpus = corpus_in_memory(DOCUMENTS, None, OPTIONS)
    expected = [("train", "one\n"), ("train", "two"), ("train", "drei\n"), ("validation", "vier ü")]
    assert documents(corpus) == expected
    assert documents(corpus) == expected  # a corpus is read several times
    assert corpus.file_bytes == 4 + 3 + 5 + 7
    assert corpus.name == "4 strings"


def test_strings_when_from_a_generator_then_are_kept() -> None:
    corpus = corpus_in_memory((text for text in DOCUMENTS), None, OPTIONS)
    assert len(documents(corpus)) == len(documents(corpus)) == 4


def test_validation_when_given_then_nothing_is_held_out() -> None:
    corpus = corpus_in_memory(["a"], datasets.Dataset.from_dict({"text": ["b", "c"]}), OPTIONS)
    assert documents(corpus) == [("train", "a"), ("validation", "b"), ("validation", "c")]
    assert corpus.file_bytes is None


def test_strings_when_some_hold_no_text_then_they_are_counted() -> None:
    skipped: Counter[str] = Counter()
    corpus = corpus_in_memory(["a", "", "b\ud800", "c"], ["d"], OPTIONS)
    assert [chunk.text for _, chunk in corpus.chunks(skipped)] == ["a", "c", "d"]
    assert skipped == {"empty": 1, "lone surrogate": 1}


def test_fingerprint_when_the_content_changes_then_changes() -> None:
    def fingerprint(texts: list[str], validation: list[str] | None = None, **options: Any) -> str:
        return corpus_in_memory(texts, validation, DataOptions(**options)).fingerprint

    first = fingerprint(["ab", "c"])
    assert fingerprint(["ab", "c"]) == first
    others = [
        fingerprint(["a", "bc"]),
        fingerprint(["c", "ab"]),
        fingerprint(["ab", "c", ""]),
        fingerprint(["ab"], ["c"]),
        fingerprint(["ab", "c"], validation_split_percentage=10),
    ]
    assert len({first, *others}) == 6


def test_dataset_when_of_equal_content_then_has_an_equal_fingerprint() -> None:
    def fingerprint(texts: list[str]) -> str:
        return corpus_in_memory(datasets.Dataset.from_dict({"text": texts}), None, OPTIONS).fingerprint

    assert fingerprint(["a", "b"]) == fingerprint(["a", "b"]) != fingerprint(["a", "c"])


def test_dataset_when_it_has_a_text_column_then_that_is_read() -> None:
    table = datasets.Dataset.from_dict({"n": [1, 2], "body": ["a", "b"]})
    corpus = corpus_in_memory(table, None, DataOptions(text_column="body"))
    assert documents(corpus) == [("train", "a"), ("validation", "b")]


def test_dataset_when_the_text_column_is_missing_then_its_columns_are_listed() -> None:
    table = datasets.Dataset.from_dict({"n": [1], "body": ["a"]})
    with pytest.raises(UserError, match="text: no column 'text'; its columns are n, body; choose one with"):
        corpus_in_memory(table, None, OPTIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a book", "text: is a str; give a list of strings"),
        (b"a book", "text: is a bytes"),
        ({"train": ["a"]}, "text: is a dict"),
        (3, "text: is a int"),
        (["a", {"text": "b"}], "text: item 1 is a dict; every document must be a str"),
        (datasets.DatasetDict(), "text: is a DatasetDict; give a datasets.Dataset"),
    ],
)
def test_text_when_of_another_type_then_is_refused(text: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        corpus_in_memory(text, None, OPTIONS)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "counts"), [([], "0 rows"), (["", ""], "2 rows (empty: 2)")])
def test_text_when_empty_then_is_refused(text: list[str], counts: str) -> None:
    with pytest.raises(UserError) as caught:
        corpus_in_memory(["a"], text, OPTIONS)
    assert str(caught.value) == f"validation: holds no text (skipped {counts}); name another"
