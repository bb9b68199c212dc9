"""Files of every format, valid and broken."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from llm.config.errors import UserError
from llm.data.sources import text_decoding
from llm.data.sources.files import resolve_files
from llm.data.sources.readers import FileSource, read_rows

TEXTS = ["one", "two\u2028still two", "drei ä€😀", 'four, "quoted"\tand\nlines']


def _source(path: Path, column: str | None = None, keep: bool = True) -> FileSource:
    return FileSource(resolve_files([str(path)], "--train_file"), column, keep)


def _documents(source: FileSource) -> list[str]:
    documents, text = [], ""
    for chunk in source(Counter()):
        text += chunk.text
        if chunk.ends:
            documents.append(text)
            text = ""
    assert text == ""
    return documents


def _error(path: Path, column: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        _documents(_source(path, column))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_txt_when_line_breaks_are_dropped_then_other_white_space_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes("one\r\ntwo \u2028\nthree".encode())
    assert _documents(_source(path, keep=False)) == ["onetwo \u2028three"]


def test_csv_when_read_then_values_of_the_text_column(tmp_path: Path) -> None:
    for ending, separator in [("csv", ","), ("tsv", "\t")]:
        path = tmp_path / f"a.{ending}"
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter=separator).writerows([["id", "text"], *enumerate(TEXTS)])
        assert _documents(_source(path)) == TEXTS


def test_csv_when_row_is_short_then_none_and_when_blank_then_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\ufeffid,text\n1,a\n\n2\n3,b\n")
    assert list(read_rows(*resolve_files([str(path)], "--f"), "text")) == ["a", None, "b"]


def test_csv_when_no_text_column_then_columns_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,body\n1,a\n")
    assert "no column 'text'; its columns are id, body; choose one with --text_column" in _error(path)
    assert _documents(_source(path, "body")) == ["a"]
    assert "no column 'bdy'" in _error(path, "bdy")


def test_csv_when_cell_is_wide_then_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "w" * 200_000 + "\n")
    assert _documents(_source(path)) == ["w" * 200_000]


def test_csv_when_quote_is_not_closed_then_error_names_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text\n"fine"\n"open\nmore\n')
    assert "broken CSV at line 4" in _error(path)


@pytest.mark.parametrize("form", ["lines", "array", "flat array", "data", "indented data", "jsonl"])
def test_json_when_objects_are_in_any_layout_then_same_rows(tmp_path: Path, form: str, monkeypatch) -> None:
    monkeypatch.setattr(text_decoding, "CHUNK_BYTES", 5)
    objects = [{"text": text, "n": 1} for text in TEXTS]
    as_lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in objects) + "\n\n"
    path = tmp_path / ("a.jsonl" if form == "jsonl" else "a.json")
    path.write_text(
        {
            "lines": as_lines,
            "jsonl": as_lines,
            "array": "\n" + json.dumps(objects, indent=1) + "\n",
            "flat array": json.dumps(objects),
            "data": json.dumps({"version": 1, "data": objects}),
            "indented data": json.dumps({"version": 1, "data": objects}, indent=2),
        }[form]
    )
    assert _documents(_source(path)) == TEXTS


def test_json_when_array_is_empty_then_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(" [ ] ")
    assert "holds no rows" in _error(path)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', 3),
        ("a.json", '{"text": "a"}\n{"text" "b"}\n', 2),
        ("a.json", '{\n"text": "a",\n"n" 1}\n', 3),
        ("a.json", '[{"text": "a"},\n{"text": b}]', 2),
        ("a.json", '[{"text": "a"},\n{"text": "b"}\n', 3),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', 2),
        ("a.json", '[{"text": "a"},\n\n{"text": "b]', 3),
        ("a.json", '[{"text": "a"}]\nx', 2),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [3, 1000])
def test_json_when_broken_then_error_names_line(
    tmp_path: Path, monkeypatch, name: str, text: str, line: int, chunk_bytes: int
) -> None:
    monkeypatch.setattr(text_decoding, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / name
    path.write_text(text)
    assert f"broken JSON at line {line} " in _error(path)


def test_json_when_items_are_not_objects_then_error_names_item(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('["a", "b"]')
    assert "item 1 is a str" in _error(path)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n"b"\n')
    assert "line 2 is a str" in _error(path)


def test_json_when_no_text_column_then_columns_of_the_rows_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x"}\n{"b": "y"}\n')
    assert "its columns are a, b;" in _error(path)


def test_json_when_some_rows_lack_the_column_then_none_for_these(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x"}\n{"text": "y"}\n')
    assert list(read_rows(*resolve_files([str(path)], "--f"), "text")) == [None, "y"]


def _write_parquet(path: Path, columns: dict) -> None:
    parquet.write_table(pyarrow.table(columns), path)


def test_parquet_when_read_then_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _write_parquet(path, {"id": list(range(4)), "text": TEXTS})
    assert _documents(_source(path)) == TEXTS


def test_parquet_when_no_text_column_then_columns_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _write_parquet(path, {"id": [1], "body": ["a"]})
    assert "its columns are id, body;" in _error(path)


def test_parquet_when_broken_or_empty_then_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _write_parquet(path, {"text": TEXTS})
    path.write_bytes(path.read_bytes()[:-20])
    assert "broken Parquet" in _error(path)
    _write_parquet(path, {"text": pyarrow.array([], pyarrow.string())})
    assert "holds no rows" in _error(path)


def test_parquet_when_a_cell_is_not_utf8_then_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    cells = pyarrow.array([b"fine", b"\xff", None]).view(pyarrow.string())
    _write_parquet(path, {"text": cells})
    assert list(read_rows(*resolve_files([str(path)], "--f"), "text")) == ["fine", b"\xff", None]


def test_file_source_when_formats_are_mixed_then_all_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n')
    _write_parquet(tmp_path / "c.parquet", {"text": ["third"]})
    assert _documents(_source(tmp_path / "*")) == ["first", "second", "third"]
