"""The files beside a stream's shards: the split, the requests, and what clearing removes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm.data.shards.format import MANIFEST, shard_path
from llm.data.sources.validation_split import SplitPoint
from llm.data.streaming.shard_folder import StreamFolder


@pytest.fixture
def folder(tmp_path: Path) -> StreamFolder:
    return StreamFolder(tmp_path)


def _finish(folder: StreamFolder, number: int) -> None:
    folder.train.mkdir(exist_ok=True)
    shard_path(folder.train, "train", number).with_suffix(".json").write_text("{}")


def test_split_when_committed_then_known_with_its_point(folder: StreamFolder) -> None:
    assert not folder.has_split
    point = SplitPoint(document=3, byte=17, num_documents=90, share=5.0, num_bytes=4000)
    folder.commit_split(point, has_text=True)
    assert folder.has_split
    assert folder.split_point() == point
    # Earlier versions read and write these keys.
    assert json.loads((folder.path / "held_out.json").read_text()) == {"has_text": True, "cut": point._asdict()}


def test_split_when_nothing_is_held_out_then_no_point_and_no_tokens(folder: StreamFolder) -> None:
    folder.commit_split(None, has_text=False)
    assert folder.split_point() is None
    assert folder.held_out() is None


def test_request_when_a_smaller_one_follows_then_the_larger_stays(folder: StreamFolder) -> None:
    assert folder.num_requested() == 0
    folder.request(5)
    folder.request(3)
    assert folder.num_requested() == 5
    folder.request(6)
    assert (folder.path / "wanted").read_text() == "6\n"


def test_num_requested_when_the_file_is_damaged_then_zero(folder: StreamFolder) -> None:
    (folder.path / "wanted").write_text("many\n")
    assert folder.num_requested() == 0


def test_has_requested_when_the_last_requested_shard_is_finished_or_the_stream_has_ended(folder: StreamFolder) -> None:
    folder.request(2)
    _finish(folder, 0)
    assert not folder.has_requested()
    _finish(folder, 1)
    assert folder.has_requested()
    folder.request(9)
    assert not folder.has_requested()
    (folder.train / MANIFEST).write_text("{}")
    assert folder.has_requested()


def test_clear_when_there_are_shards_then_only_the_lock_is_left(folder: StreamFolder) -> None:
    folder.clear()  # an empty folder
    folder.request(1)
    folder.commit_split(None, has_text=False)
    _finish(folder, 0)
    folder.validation.mkdir()
    folder.lock.write_text("{}")
    folder.clear()
    assert [path.name for path in folder.path.iterdir()] == [".lock"]
    assert (folder.num_requested(), folder.has_split) == (0, False)
