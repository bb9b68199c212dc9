"""What of a stream is held out, and what is left of it."""

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
    """The documents, the one that does not end with a `+`."""
    found = [""]
    for part in source(Counter()) if source is not None else ():
        found[-1] += part.text
        if part.ends:
            found.append("")
    return [*found[:-1], *([f"{found[-1]}+"] if found[-1] else [])]


def stream(*files: Path, head_bytes: int = 2000, **options: object) -> TextStream:
    return TextStream(DataOptions(train_file=tuple(map(str, files)), **options), None, head_bytes)


def test_head_when_held_out_then_the_rest_is_what_follows(rows: Path) -> None:
    text = stream(rows, validation_split_percentage=10)
    cut = text.find_split_point()
    assert texts(text.validation(cut)) == [f"{number:010d}" for number in range(20)]  # 10 % of the first 2,000 bytes
    assert texts(text.train(cut)) == [f"{number:010d}" for number in range(20, 1000)]
    assert text.find_split_point() == cut


def test_head_when_the_text_is_short_then_a_share_of_all_of_it(rows: Path) -> None:
    text = stream(rows, head_bytes=1 << 20, validation_split_percentage=10)
    assert len(texts(text.validation(text.find_split_point()))) == 100


def test_head_when_the_text_is_one_document_then_cut_inside(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    text = stream(tmp_path / "a.txt", validation_split_percentage=10)
    cut = text.find_split_point()
    assert texts(text.validation(cut)) == ["0123456789+"]
    assert texts(text.train(cut)) == ["0123456789" * 9]


def test_head_when_nothing_is_asked_for_then_none(rows: Path) -> None:
    text = stream(rows, validation_split_percentage=0)
    assert text.find_split_point() is None
    assert text.validation(None) is None
    assert len(texts(text.train(None))) == 1000


def test_held_out_when_the_text_has_its_own_then_its_first_bytes(rows: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"own {number:06d}"}) + "\n" for number in range(1000)))
    text = stream(rows, validation_file=(str(own),), head_bytes=105)
    assert text.find_split_point() is None
    assert texts(text.validation(None)) == [f"own {number:06d}" for number in range(11)]
    assert len(texts(text.train(None))) == 1000


def test_head_when_there_is_no_text_then_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n')
    with pytest.raises(UserError, match="holds no text"):
        stream(tmp_path / "a.jsonl").find_split_point()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The revisions of which a Hub dataset was opened."""
    found: list[str | None] = []

    def open_streaming_corpus(options: DataOptions, revision: str | None) -> Corpus:
        found.append(revision)
        return Corpus(
            "set", "", lambda skipped: iter([TextChunk("a", True), TextChunk("b", True)]), None, 50, is_streamed=True
        )

    monkeypatch.setattr(text_streams, "open_streaming_corpus", open_streaming_corpus)
    return found


def test_hub_dataset_when_not_read_then_nothing_is_asked(opened: list[str | None]) -> None:
    def made(revision: str, **options: object) -> TextStream:
        return TextStream(DataOptions(dataset_name="some/set", **options), revision)

    text = made("c1", dataset_config_name="en")
    assert text.name == "some/set/en"
    prints: list[Callable[[], str]] = [
        lambda: made("c1").fingerprint,
        lambda: made("c2").fingerprint,
        lambda: made("c1", text_column="body").fingerprint,
        lambda: made("c1", validation_split_percentage=3).fingerprint,
        lambda: text.fingerprint,
    ]
    assert len({take() for take in prints}) == 5
    assert prints[0]() == prints[0]()
    assert opened == []
    assert text.find_split_point() is not None
    assert opened == ["c1"]
    # Goes to another process by its names; the open stream, which could not, stays.
    assert pickle.loads(pickle.dumps(text)).fingerprint == text.fingerprint
