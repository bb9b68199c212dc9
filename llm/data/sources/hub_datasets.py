"""Datasets of the HuggingFace Hub, and those that `save_to_disk` wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.config.errors import UserError, first_line
from llm.data.sources.documents import Skipped, TextChunk, rows_to_documents
from llm.data.sources.readers import column_values, missing_column_error

_BATCH_ROWS = 1024

# How `datasets` lists configurations: "Available: ['a', 'b']", "available configs: ['a', 'b']", ...
_CONFIGURATIONS = re.compile(r"[Aa]vailable[^\[\]]*: *\[([^\]]*)\]")


@dataclass(frozen=True)
class TableRows:
    """One split of a dataset: a `Source` when called.

    Attributes:
        name: what messages call the dataset.
        table: a `datasets.Dataset`.
        column: the column that holds the text.
    """

    name: str
    table: Any
    column: str

    def __call__(self, skipped: Skipped) -> Iterator[TextChunk]:
        """The documents that the rows form; see `rows_to_documents`."""
        return rows_to_documents(self._rows(), skipped)

    def _rows(self) -> Iterator[object]:
        columns = self.table.select_columns([self.column]).with_format("arrow")
        try:
            for batch in columns.iter(_BATCH_ROWS):
                yield from column_values(batch.column(0))
        except OSError as error:  # the table lies in files, which may be damaged or gone
            raise UserError(
                f"dataset {self.name}: cannot be read ({first_line(error).rstrip('.')});"
                " remove it from HuggingFace's cache and load it again"
            ) from error


def table_rows(name: str, table: Any, text_column: str | None) -> TableRows:
    """The text of a split.

    Raises:
        UserError: it has no such column; lists those that it has.
    """
    column = text_column or "text"
    if column not in table.column_names:
        raise missing_column_error(f"dataset {name}", column, table.column_names)
    return TableRows(name, table, column)


def load_hub(name: str, configuration: str | None) -> Mapping[str, Any]:
    """Downloads a dataset of the Hub, or finds it in HuggingFace's cache.

    Returns:
        Its splits, each a `datasets.Dataset`.

    Raises:
        UserError: there is no such dataset or configuration, it cannot be reached, or it is broken.
    """
    import datasets

    try:
        splits: Mapping[str, Any] = datasets.load_dataset(name, configuration)
    except Exception as error:  # the library raises many kinds, and those of its HTTP client
        raise loading_error(name, configuration, error) from error
    return splits


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    one = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def load_saved(folder: Path) -> Mapping[str, Any]:
    """The splits of a dataset that `save_to_disk` wrote; one without splits is all `train`.

    Raises:
        UserError: the folder is damaged.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # as above
        reason = first_line(_real_cause(error)).rstrip(".")
        raise UserError(
            f"--dataset_name {folder}: cannot be loaded ({reason}); write it again with save_to_disk"
        ) from error
    if isinstance(found, datasets.Dataset):
        return {"train": found}
    splits: Mapping[str, Any] = found
    return splits


def loading_error(name: str, configuration: str | None, error: Exception) -> UserError:
    """The refusal of a dataset of the Hub, with the cause and the mend."""
    cause = _real_cause(error)
    listed = _CONFIGURATIONS.search(str(cause).replace("\n", " "))
    if listed is not None:
        known = listed.group(1).replace("'", "")
        if configuration is None:
            return UserError(f"--dataset_name {name}: choose a configuration with --dataset_config_name: {known}")
        return UserError(f"--dataset_config_name {configuration}: {name} has no such configuration; it has {known}")
    reason = first_line(cause).rstrip(".")
    if isinstance(cause, ConnectionError):
        mend = "connect this machine, or download the dataset elsewhere and name its folder"
    elif isinstance(cause, FileNotFoundError):
        mend = "check the spelling, or log in with `hf auth login` if it is private or gated"
    else:
        mend = "mend the dataset, or name files with --train_file"
    return UserError(f"--dataset_name {name}: cannot be loaded ({reason}); {mend}")


def _real_cause(error: BaseException) -> BaseException:
    """What lies below the generic error that `datasets` wraps around a failure of a file."""
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return error
