"""Read files as documents: the rows of each format, and the column of a row that holds the text."""

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

# Characters. A text is one cell of any length. (The limit is a C long, which has 32 bits on some systems.)
_LARGEST_CELL = 2**31 - 1

# JSON objects need not have the same keys: this many may lack the text column before the first one has it.
_ROWS_WITHOUT_COLUMN = 100

_PARQUET_BATCH_ROWS = 1024

_LINE_BREAKS = str.maketrans("", "", "\r\n")


@dataclass(frozen=True)
class FileSource:
    """A `TextSource` over files.

    Attributes:
        files: the files, in the order of reading.
        text_column: the column that holds the text in files of rows; `text` when None.
        keep_linebreaks: whether to keep the line breaks of txt and md files.
    """

    files: Sequence[TextFile]
    text_column: str | None = None
    keep_linebreaks: bool = True

    def __call__(self, skipped: Skipped) -> Iterator[TextChunk]:
        """Yield the documents of the files: a txt or md file is one document; for rows see `rows_to_documents`.

        Args:
            skipped: counts the rows that hold no text.

        Raises:
            UserError: a file is broken, is not text, or lacks the text column.
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
    """Yield the text column of a file of rows: values of any type, None where a row has no value.

    Args:
        file: a file whose kind is one of `ROW_KINDS`.
        column: the name of the text column.

    Raises:
        UserError: the file is broken (the message names the line), holds no rows, or has no such column.
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


def missing_column_error(origin: object, column: str, columns: Iterable[object]) -> UserError:
    """Make the error for a table that lacks the text column.

    Args:
        origin: the table's name in the message.
        column: the missing column.
        columns: the columns that the table has.
    """
    listed = ", ".join(map(str, columns)) or "none"
    return UserError(f"{origin}: no column {column!r}; its columns are {listed}; choose one with --text_column")


def _separated_rows(file: TextFile, column: str, separator: str) -> Iterator[object]:
    csv.field_size_limit(_LARGEST_CELL)
    table = csv.reader(split_lines(read_text(file)), delimiter=separator, strict=True)
    try:
        header = next((row for row in table if row), [])
        if column not in header:
            raise missing_column_error(file.path, column, header)
        index = header.index(column)
        for row in table:
            if row:
                yield row[index] if index < len(row) else None
    except csv.Error as error:
        raise UserError(
            f"{file.path}: broken {file.kind.upper()} at line {table.line_num} ({error});"
            " double the quotes inside a quoted cell"
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
    """Return the values of an Arrow column as Python objects; a string that is not valid UTF-8 becomes bytes.

    Args:
        values: a `pyarrow` array or chunked array.
    """
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
    """Yield a column of JSON objects; an error if none of the first `_ROWS_WITHOUT_COLUMN` objects has it."""
    objects = _objects(file, column)
    head = list(islice(objects, _ROWS_WITHOUT_COLUMN))
    if not head:
        raise UserError(f"{file.path}: holds no rows; name a file that holds text")
    if not any(column in row for row in head):
        raise missing_column_error(file.path, column, dict.fromkeys(key for row in head for key in row))
    for row in chain(head, objects):
        yield row.get(column)


def _objects(file: TextFile, column: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSON lines, of an array, or of the list under `data` of a single object."""
    chunks = read_text(file)
    first_chunks = []
    for chunk in chunks:
        first_chunks.append(chunk)
        if not chunk.isspace():
            break
    text = chain(first_chunks, chunks)
    if first_chunks[-1].lstrip().startswith("[") and file.kind == "json":
        for number, value in enumerate(iter_items(text, str(file.path)), start=1):
            yield _object(file, f"item {number}", value)
    else:
        yield from _object_lines(file, split_lines(text), column)


def _object_lines(file: TextFile, text: Iterator[str], column: str) -> Iterator[dict[str, Any]]:
    is_first = True
    for number, line in enumerate(text, start=1):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not is_first or file.kind == "jsonl":
                raise _broken_json(file, number, error) from None
            value = _single_value(file, "\n" * (number - 1) + line + "".join(text))
        if is_first and file.kind == "json" and _is_wrapper(value, column):
            for item_number, item in enumerate(value["data"], start=1):
                yield _object(file, f"item {item_number} of data", item)
        else:
            yield _object(file, f"line {number}", value)
        is_first = False


def _single_value(file: TextFile, text: str) -> Any:
    """Parse a file that is one JSON value on several lines."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken_json(file, getattr(error, "lineno", 1), error) from None


def _is_wrapper(value: object, column: str) -> bool:
    return isinstance(value, dict) and column not in value and isinstance(value.get("data"), list)


def _object(file: TextFile, position: str, value: object) -> dict[str, Any]:
    """Return the value if it is a JSON object.

    Raises:
        UserError: the value has another type; the message names its position.
    """
    if isinstance(value, dict):
        return value
    raise UserError(
        f"{file.path}: {position} is a {type(value).__name__}; expected an object with columns, such as "
        '{"text": "..."}'
    )


def _broken_json(file: TextFile, line: int, error: Exception) -> UserError:
    reason = getattr(error, "msg", None) or str(error)
    return UserError(f"{file.path}: broken JSON at line {line} ({reason}); fix or remove it")
