"""Rows as documents, and the counts of skipped rows."""

from __future__ import annotations

from collections import Counter

from llm.data.sources.documents import Skipped, format_skipped, rows_to_documents


def _documents(rows: list[object]) -> tuple[list[str], Skipped]:
    skipped: Skipped = Counter()
    documents, text = [], ""
    for chunk in rows_to_documents(rows, skipped):
        text += chunk.text
        if chunk.ends:
            documents.append(text)
            text = ""
    assert text == ""
    return documents, skipped


def test_rows_to_documents_when_rows_end_in_newlines_then_one_document() -> None:
    documents, skipped = _documents(["", " = A = \n", "", "b\n", ""])
    assert documents == [" = A = \nb\n"]
    assert skipped == {"empty": 3}


def test_rows_to_documents_when_rows_without_newline_follow_then_they_end_the_running_text() -> None:
    documents, _ = _documents(["a\n", "b\n", "c", "d", "e\n"])
    assert documents == ["a\nb\n", "c", "d", "e\n"]


def test_rows_to_documents_when_rows_hold_no_text_then_counted_by_reason() -> None:
    documents, skipped = _documents(["a", None, 3, "x\ud800", b"\xff", "", None, "b"])
    assert documents == ["a", "b"]
    assert skipped == {
        "null": 2,
        "not text": 1,
        "lone surrogate": 1,
        "bytes, not valid UTF-8 text": 1,
        "empty": 1,
    }
    assert format_skipped(Counter(empty=10, null=2)) == "12 rows (empty: 10, null: 2)"
