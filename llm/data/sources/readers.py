"""Files as documents: what a row is in each format, and where its text stands."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from llm.config.errors import UserError, first_line
from llm.data.sources.documents import Skipped, TextChunk, rows_to_documents
from llm.data.sources.files import DOCUMENT_KINDS, TextFile
from llm.data.sources.json_array import iter_items
from llm.data.sources.text_decoding import read_text, split_lines

# A text is one cell, however long. (The limit is a C long, which has 32 bits on some systems.)
_LARGEST_CELL = 2**31 - 1

# Objects in JSON need not have the same keys: so many may lack the text column before one has it.
_ROWS_WITHOUT_COLUMN = 100

_PARQUET_BATCH_ROWS = 1024

_LINE_BREAKS = str.maketrans("", "", "\r\n")


@dataclass(frozen=True)
class FileSource:
    """A text in files: a `Source` when called.

    Attributes:
        files: what is read, in this order.
        text_column: the column of the text in rows; `text` when None.
        keep_linebreaks: whether the line breaks of txt and md files stay.
    """

    files: Sequence[TextFile]
    text_column: str | None = None
    keep_linebreaks: bool = True

    def __call__(self, skipped: Skipped) -> Iterator[TextChunk]:
        """The documents of the files: a txt or md file is one; else see `rows_to_documents`.

        Raises:
            UserError: a file is broken, is no text, or has no such column.
        """
        for file in self.files:
            if file.kind in DOCUMENT_KINDS:
                yield from self._document(file)
            else:
                yield from rows_to_documents(read_rows(file, self.text_column or "text"), skipped)

    def _document(self, file: TextFile) -> Iterator[TextChunk]:
        for chunk in read_text(file):
            text = chunk if self.keep_linebreaks else chunk.translate(_LINE_BREAKS)
            yield TextChunk(text, ends=False)
        yield TextChunk("", ends=True)


def read_rows(file: TextFile, column: str) -> Iterator[object]:
    """The text column of a file of rows: whatever stands there, None where nothing does.

    Raises:
        UserError: the file is broken (names the line), holds no rows, or has no such column.
    """
    match file.kind:
        case "csv":
            return _separated_rows(file, column, ",")
        case "tsv":
            return _separated_rows(file, column, "\t")
        case "parquet":
            return _parquet_rows(file, column)
        case _:
            return _object_rows(file, column)


def missing_column_error(place: object, column: str, columns: Iterable[object]) -> UserError:
    """The refusal of a table without the text column."""
    names = [str(name) for name in columns]
    listed = ", ".join(names) if names else "none"
    return UserError(f"{place}: no column {column!r}; its columns are {listed}; choose one with --text_column")


def _separated_rows(file: TextFile, column: str, separator: str) -> Iterator[object]:
    csv.field_size_limit(_LARGEST_CELL)
    table = csv.reader(split_lines(read_text(file)), delimiter=separator, strict=True)
    try:
        header = next((row for row in table if row), [])
        if column not in header:
            raise missing_column_error(file.path, column, header)
        place = header.index(column)
        for row in table:
            if row:
                yield row[place] if place < len(row) else None
    except csv.Error as error:
        raise UserError(
            f"{file.path}: broken {file.kind.upper()} at line {table.line_num} ({error});"
            " quotes inside a quoted cell are doubled"
        ) from None


def _parquet_rows(file: TextFile, column: str) -> Iterator[object]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file.path) as table:
            if column not in table.schema_arrow.names:
                raise missing_column_error(file.path, column, table.schema_arrow.names)
            if table.metadata.num_rows == 0:
                raise UserError(f"{file.path}: holds no rows; name a file that holds text")
            for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=[column]):
                yield from column_values(batch.column(0))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.path}: broken Parquet file ({first_line(error)}); write it again") from None


def column_values(values: Any) -> list[object]:
    """The values of an Arrow column; a string that is not valid UTF-8 comes as its bytes."""
    import pyarrow

    try:
        return list(values.to_pylist())
    except UnicodeDecodeError:
        return [_text_or_bytes(value) for value in values.cast(pyarrow.large_binary()).to_pylist()]


def _text_or_bytes(value: bytes | None) -> object:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _object_rows(file: TextFile, column: str) -> Iterator[object]:
    """The column of JSON objects; of several hundred without it, the first ones tell."""
    objects = _objects(file, column)
    head = list(islice(objects, _ROWS_WITHOUT_COLUMN))
    if not head:
        raise UserError(f"{file.path}: holds no rows; name a file that holds text")
    if not any(column in row for row in head):
        raise missing_column_error(file.path, column, dict.fromkeys(key for row in head for key in row))
    for row in chain(head, objects):
        yield row.get(column)


def _objects(file: TextFile, column: str) -> Iterator[dict[str, Any]]:
    """Objects of JSON lines, of an array, or of the list under `data` of a single object."""
    chunks = read_text(file)
    blank = []
    for chunk in chunks:
        blank.append(chunk)
        if not chunk.isspace():
            break
    text = chain(blank, chunks)
    if blank[-1].lstrip().startswith("[") and file.kind == "json":
        for number, value in enumerate(iter_items(text, str(file.path)), start=1):
            yield _object(file, f"item {number}", value)
    else:
        yield from _object_lines(file, split_lines(text), column)


def _object_lines(file: TextFile, text: Iterator[str], column: str) -> Iterator[dict[str, Any]]:
    first = True
    for number, line in enumerate(text, start=1):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not first or file.kind == "jsonl":
                raise _broken_json(file, number, error) from None
            value = _single_value(file, "\n" * (number - 1) + line + "".join(text))
        if first and file.kind == "json" and _is_wrapper(value, column):
            for place, item in enumerate(value["data"], start=1):
                yield _object(file, f"item {place} of data", item)
        else:
            yield _object(file, f"line {number}", value)
        first = False


def _single_value(file: TextFile, text: str) -> Any:
    """The value of a file that is one, over several lines."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken_json(file, getattr(error, "lineno", 1), error) from None


def _is_wrapper(value: object, column: str) -> bool:
    return isinstance(value, dict) and column not in value and isinstance(value.get("data"), list)


def _object(file: TextFile, place: str, value: object) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise UserError(
        f'{file.path}: {place} is no object with columns, such as {{"text": "..."}}, but a {type(value).__name__}'
    )


def _broken_json(file: TextFile, line: int, error: Exception) -> UserError:
    reason = getattr(error, "msg", None) or str(error)
    return UserError(f"{file.path}: broken JSON at line {line} ({reason}); mend or remove it")
