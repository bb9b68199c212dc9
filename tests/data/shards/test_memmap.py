"""Memory-mapped token files, read as one sequence."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llm.data.shards.memmap import FileSequence, FileSlice, MappedTokens, SlicedSegment, TokenFile, Tokens


def _files(folder: Path, sizes: list[int], dtype: str = "<u2") -> Iterator[TokenFile]:
    first = 0
    for number, size in enumerate(sizes):
        path = folder / f"{number}.bin"
        path.write_bytes(b"h" * number + np.arange(first, first + size).astype(dtype).tobytes())
        yield TokenFile(path, dtype, size, number)
        first += size


def test_tokens_when_sliced_then_as_one_array(tmp_path: Path) -> None:
    sizes = [5, 0, 1, 13, 0, 2]
    tokens = Tokens(list(_files(tmp_path, sizes)))
    whole = np.arange(sum(sizes))
    assert len(tokens) == len(whole)
    for start in range(-3, len(whole) + 2):
        for stop in (*range(-3, len(whole) + 2), None):
            assert tokens[start:stop].tolist() == whole[start:stop].tolist()
            part = tokens.sliced(start, stop)
            assert part[:].tolist() == whole[start:stop].tolist()
            assert part[1:4].tolist() == whole[start:stop][1:4].tolist()
    with pytest.raises(ValueError, match="without a step"):
        tokens[::2]


def test_tokens_when_inside_one_file_then_nothing_is_copied_and_a_pickle_is_small(tmp_path: Path) -> None:
    tokens = Tokens(list(_files(tmp_path, [5000, 5000])))
    piece = tokens[100:4000]
    assert not piece.flags.owndata and not piece.flags.writeable
    sent = pickle.dumps(tokens)
    assert len(sent) < 1000
    assert pickle.loads(sent)[4990:5010].tolist() == list(range(4990, 5010))


def test_tokens_when_read_often_then_views_stay_valid(tmp_path: Path) -> None:
    tokens = Tokens(list(_files(tmp_path, [3000, 3000])))
    kept = tokens[10:20]
    for start in range(2000):
        assert tokens[start : start + 3].tolist() == [start, start + 1, start + 2]
    assert kept.tolist() == list(range(10, 20))


def test_file_sequence_when_a_range_crosses_files_then_the_part_of_each(tmp_path: Path) -> None:
    files = FileSequence(list(_files(tmp_path, [5, 0, 4])), [5, 0, 4])
    parts = list(files.slices(3, 8))
    assert [(part.start, part.stop, part.offset) for part in parts] == [(3, 5, 0), (0, 3, 5)]
    assert [part.content.tolist() for part in parts] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    assert all(isinstance(part, FileSlice) for part in parts)
    assert list(files.slices(4, 4)) == []
    assert files.ends == [5, 5, 9]


def test_mapped_tokens_when_released_then_views_read_the_file_again(tmp_path: Path) -> None:
    (file,) = _files(tmp_path, [100])
    mapped = file.map()
    view = mapped.sliced(10, 15)
    mapped.release()
    assert view.ids.tolist() == [10, 11, 12, 13, 14]
    MappedTokens(np.arange(3)).release()  # there is no map to release


def test_sliced_segment_when_mapped_then_its_range_in_the_type_of_the_file(tmp_path: Path) -> None:
    (file,) = _files(tmp_path, [100], "<u4")
    ids = SlicedSegment(file, 40, 3).map().ids
    assert (ids.tolist(), ids.dtype) == ([40, 41, 42], np.uint32)


def test_tokens_when_concatenated_then_only_names_are_joined(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = Tokens(list(_files(tmp_path / "a", [5, 5]))).sliced(3, 7)
    second = Tokens(list(_files(tmp_path / "b", [4])))
    assert Tokens.concatenated([first, second, first])[:].tolist() == [3, 4, 5, 6, 0, 1, 2, 3, 3, 4, 5, 6]
    assert len(Tokens.concatenated([])) == 0
