"""Streamed datasets of the Hub, without the Hub."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import pytest

from llm.config.errors import UserError
from llm.config.options import DataOptions
from llm.data.sources import hub_streaming
from llm.data.sources.corpus import Corpus
from llm.data.sources.hub_streaming import is_hub_dataset, load_streaming_dataset, open_streaming_corpus


def _table(*texts: str, column: str = "text") -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({column: list(texts)}).to_iterable_dataset()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """Makes the Hub hold these splits at the commit `abc`."""

    def hold(**splits: object) -> None:
        monkeypatch.setattr(
            hub_streaming, "load_streaming_dataset", lambda name, configuration, revision: (splits, revision or "abc")
        )

    return hold


def _open(revision: str | None = None, **options: object) -> Corpus:
    return open_streaming_corpus(DataOptions(dataset_name="some/set", **options), revision)


def _texts(corpus: Corpus) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    for split, chunk in corpus.chunks(Counter()):
        texts[split].append(chunk.text)
    return texts


def test_streaming_corpus_when_it_has_validation_then_that_is_used(hub) -> None:
    hub(train=_table("a", "b"), validation=_table("c"), test=_table("d"))
    corpus = _open()
    assert corpus.is_streamed
    assert corpus.validation_split_percentage == 0
    assert _texts(corpus) == {"train": ["a", "b"], "validation": ["c"]}


def test_streaming_corpus_when_it_has_no_validation_then_documents_are_held_out_by_hash(hub) -> None:
    documents = [f"document {number}" for number in range(500)]
    hub(train=_table(*documents))
    texts = _texts(_open(validation_split_percentage=20))
    assert sorted(texts["train"] + texts["validation"]) == sorted(documents)
    assert 60 < len(texts["validation"]) < 140
    hub(train=_table(*reversed(documents)))
    assert set(_texts(_open(validation_split_percentage=20))["validation"]) == set(texts["validation"])


def test_streaming_corpus_when_revision_or_options_change_then_fingerprint_changes(hub) -> None:
    hub(train=_table("a"))
    first = _open().fingerprint
    assert _open().fingerprint == first == _open("abc").fingerprint
    others = {_open("def").fingerprint, _open(validation_split_percentage=7).fingerprint}
    others |= {_open(text_column="body").fingerprint, _open(dataset_config_name="x").fingerprint}
    assert len(others | {first}) == 5


def test_streaming_corpus_when_it_has_no_train_split_then_error_lists_splits(hub) -> None:
    hub(test=_table("a"))
    with pytest.raises(UserError, match="no split called train; it has test"):
        _open()


def test_streaming_corpus_when_it_lacks_the_column_then_error_lists_columns(hub) -> None:
    hub(train=_table("a", column="body"), validation=_table("b", column="body"))
    with pytest.raises(UserError, match="dataset some/set/x: no column 'text'; its columns are body;"):
        _texts(_open(dataset_config_name="x"))
    assert _texts(_open(text_column="body")) == {"train": ["a"], "validation": ["b"]}


def test_streaming_corpus_when_the_download_stops_then_error_names_the_cause_and_the_fix(hub) -> None:
    def rows():
        yield {"text": "a"}
        raise ConnectionError("the line is dead\nmore")

    hub(train=rows(), validation=_table("b"))
    chunks = _open().chunks(Counter())
    assert next(chunks)[1].text == "a"
    with pytest.raises(UserError, match=r"^dataset some/set: .*\(the line is dead\); start the same command again"):
        next(chunks)


def test_load_streaming_dataset_when_it_cannot_be_reached_then_error_names_the_fix(monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"^--dataset_name some/set: .*connect this machine"):
        load_streaming_dataset("some/set", None, "abc")


def test_is_hub_dataset_when_built_in_or_on_the_disk_then_false(tmp_path: Path) -> None:
    assert is_hub_dataset("some/set")
    assert not is_hub_dataset(None)
    assert not is_hub_dataset("builtin:python")
    assert not is_hub_dataset(str(tmp_path))
