"""Text of files: compression, UTF-8 and lines."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pyarrow
import pytest

from llm.config.errors import UserError
from llm.data.sources import text_decoding
from llm.data.sources.files import resolve_files
from llm.data.sources.text_decoding import read_text, split_lines

TEXTS = ["one", "two\u2028still two", "drei ä€😀", 'four, "quoted"\tand\nlines']


def _read(path: Path) -> str:
    [file] = resolve_files([str(path)], "--train_file")
    return "".join(read_text(file))


def _error(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        _read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def _compress(data: bytes, compression: str) -> bytes:
    if compression == "zst":
        return pyarrow.compress(data, codec="zstd", asbytes=True)
    return {"gz": gzip, "bz2": bz2, "xz": lzma}[compression].compress(data)


def test_read_text_when_text_has_line_ends_and_a_byte_order_mark_then_only_the_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n\x85three\r")
    with pytest.raises(UserError, match=r"byte 13\b"):
        _read(path)
    path.write_bytes("\ufeffone\r\ntwo\n\nthree\r".encode())
    assert _read(path) == "one\r\ntwo\n\nthree\r"


def test_read_text_when_chunks_end_inside_characters_then_text_is_unchanged(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(text_decoding, "CHUNK_BYTES", 3)
    path = tmp_path / "a.txt"
    path.write_text("".join(TEXTS))
    assert _read(path) == "".join(TEXTS)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "zst"])
def test_read_text_when_compressed_then_same_text(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.txt.{compression}"
    path.write_bytes(_compress("".join(TEXTS).encode(), compression))
    assert _read(path) == "".join(TEXTS)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "zst"])
def test_read_text_when_compressed_file_is_truncated_then_error(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.txt.{compression}"
    path.write_bytes(_compress(bytes(range(1, 127)) * 99, compression)[:-9])
    assert f"broken .{compression}" in _error(path)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "zst"])
def test_read_text_when_file_is_not_compressed_then_error(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.txt.{compression}"
    path.write_text("plain text")
    assert f"broken .{compression}" in _error(path)


def test_read_text_when_compressed_file_is_empty_then_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b""))
    assert "is empty" in _error(path)


def test_read_text_when_not_utf8_then_error_names_byte(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(text_decoding, "CHUNK_BYTES", 4)
    path = tmp_path / "a.txt"
    path.write_bytes("äöü".encode() + b"caf\xe9 au lait")
    assert "not UTF-8 (byte 9)" in _error(path)


def test_read_text_when_file_ends_inside_a_character_then_error_names_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("ab€".encode()[:-1])
    assert "not UTF-8 (byte 2)" in _error(path)


def test_read_text_when_file_has_a_nul_byte_then_error_names_byte(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(text_decoding, "CHUNK_BYTES", 4)
    path = tmp_path / "a.txt"
    path.write_bytes(b"abcdefg\0h")
    assert "NUL byte at byte 7" in _error(path)


def test_read_text_when_compressed_text_is_not_utf8_then_byte_of_decompressed_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"caf\xe9"))
    assert "byte 3 of the decompressed text" in _error(path)


def test_split_lines_when_chunks_divide_lines_then_lines_end_at_newlines_only() -> None:
    assert list(split_lines(["a", "b\u2028c\nd\r", "\n\ne", "f"])) == ["ab\u2028c\n", "d\r\n", "\n", "ef"]
