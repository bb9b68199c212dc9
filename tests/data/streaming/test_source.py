"""The held-out part of a stream, and the part that is left for training."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.config.errors import UserError
from llm.config.options import DataOptions
from llm.data.sources.corpus import Corpus
from llm.data.sources.documents import TextChunk, TextSource
from llm.data.streaming import source as text_streams
from llm.data.streaming.source import TextStream


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number:010d}"}) + "\n" for number in range(1000)))
    return path


def texts(source: TextSource | None) -> list[str]:
    """Return the documents; one that does not end gets a `+`."""
    documents = [""]
    for part in source(Counter()) if source is not None else ():
        documents[-1] += part.text
        if part.ends:
            documents.append("")
    return [*documents[:-1], *([f"{documents[-1]}+"] if documents[-1] else [])]


def stream(*files: Path, head_bytes: int = 2000, **options: object) -> TextStream:
    return TextStream(DataOptions(train_file=tuple(map(str, files)), **options), None, head_bytes)


def test_split_point_when_the_head_is_held_out_then_training_follows_it(rows: Path) -> None:
    text = stream(rows, validation_split_percentage=10)
    cut = text.find_split_point()
    assert texts(text.validation(cut)) == [f"{number:010d}" for number in range(20)]  # 10 % of the first 2,000 bytes
    assert texts(text.train(cut)) == [f"{number:010d}" for number in range(20, 1000)]
    assert text.find_split_point() == cut


def test_split_point_when_the_text_is_short_then_a_percentage_of_all_of_it(rows: Path) -> None:
    text = stream(rows, head_bytes=1 << 20, validation_split_percentage=10)
    assert len(texts(text.validation(text.find_split_point()))) == 100


def test_split_point_when_the_text_is_one_document_then_inside_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    text = stream(tmp_path / "a.txt", validation_split_percentage=10)
    cut = text.find_split_point()
    assert texts(text.validation(cut)) == ["0123456789+"]
    assert texts(text.train(cut)) == ["0123456789" * 9]


def test_split_point_when_the_percentage_is_zero_then_none(rows: Path) -> None:
    text = stream(rows, validation_split_percentage=0)
    assert text.find_split_point() is None
    assert text.validation(None) is None
    assert len(texts(text.train(None))) == 1000


def test_validation_when_the_text_has_a_validation_split_then_its_first_bytes(rows: Path, tmp_path: Path) -> None:
    validation = tmp_path / "own.jsonl"
    validation.write_text("".join(json.dumps({"text": f"own {number:06d}"}) + "\n" for number in range(1000)))
    text = stream(rows, validation_file=(str(validation),), head_bytes=105)
    assert text.find_split_point() is None
    assert texts(text.validation(None)) == [f"own {number:06d}" for number in range(11)]
    assert len(texts(text.train(None))) == 1000


def test_split_point_when_there_is_no_text_then_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n')
    with pytest.raises(UserError, match="holds no text"):
        stream(tmp_path / "a.jsonl").find_split_point()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The revisions with which a Hub dataset was opened."""
    revisions: list[str | None] = []

    def open_streaming_corpus(options: DataOptions, revision: str | None) -> Corpus:
        revisions.append(revision)
        return Corpus(
            "set", "", lambda skipped: iter([TextChunk("a", True), TextChunk("b", True)]), None, 50, is_streamed=True
        )

    monkeypatch.setattr(text_streams, "open_streaming_corpus", open_streaming_corpus)
    return revisions


def test_fingerprint_when_a_hub_dataset_is_not_read_then_it_is_not_opened(opened: list[str | None]) -> None:
    def hub_stream(revision: str, **options: object) -> TextStream:
        return TextStream(DataOptions(dataset_name="some/set", **options), revision)

    text = hub_stream("c1", dataset_config_name="en")
    assert text.name == "some/set/en"
    prints: list[Callable[[], str]] = [
        lambda: hub_stream("c1").fingerprint,
        lambda: hub_stream("c2").fingerprint,
        lambda: hub_stream("c1", text_column="body").fingerprint,
        lambda: hub_stream("c1", validation_split_percentage=3).fingerprint,
        lambda: text.fingerprint,
    ]
    assert len({take() for take in prints}) == 5
    assert prints[0]() == prints[0]()
    assert opened == []
    assert text.find_split_point() is not None
    assert opened == ["c1"]
    # Goes to another process by its names; the open stream, which could not, stays.
    assert pickle.loads(pickle.dumps(text)).fingerprint == text.fingerprint
