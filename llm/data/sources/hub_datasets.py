"""Datasets of the HuggingFace Hub, and datasets that `save_to_disk` wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llm.config.errors import UserError, first_line
from llm.data.sources.documents import RowSource
from llm.data.sources.readers import column_values, missing_column_error

_BATCH_ROWS = 1024

# How `datasets` lists configurations: "Available: ['a', 'b']", "available configs: ['a', 'b']", ...
_CONFIGURATIONS = re.compile(r"[Aa]vailable[^\[\]]*: *\[([^\]]*)\]")


def table_source(name: str, table: Any, text_column: str | None) -> RowSource:
    """Return the text of one split of a dataset.

    Args:
        name: the dataset's name in messages.
        table: a `datasets.Dataset`.
        text_column: the column that holds the text; `text` when None.

    Raises:
        UserError: the table has no such column; the message lists its columns.
    """
    column = text_column or "text"
    if column not in table.column_names:
        raise missing_column_error(f"dataset {name}", column, table.column_names)
    return RowSource(partial(_read_column, name, table, column))


def _read_column(name: str, table: Any, column: str) -> Iterator[object]:
    batches = table.select_columns([column]).with_format("arrow")
    try:
        for batch in batches.iter(_BATCH_ROWS):
            yield from column_values(batch.column(0))
    except OSError as error:  # the table's files may be damaged or removed
        raise UserError(
            f"dataset {name}: cannot be read ({_reason(error)}); remove it from HuggingFace's cache and load it again"
        ) from error


def load_hub(name: str, configuration: str | None) -> Mapping[str, Any]:
    """Load a dataset of the Hub from HuggingFace's cache, or download it.

    Returns:
        The dataset's splits by name, each a `datasets.Dataset`.

    Raises:
        UserError: there is no such dataset or configuration, the Hub cannot be reached, or the dataset is broken.
    """
    import datasets

    try:
        splits: Mapping[str, Any] = datasets.load_dataset(name, configuration)
    except Exception as error:  # the library raises many types, also those of its HTTP client
        raise loading_error(name, configuration, error) from error
    return splits


def require_train_split(name: str, splits: Iterable[str]) -> None:
    """Check that a dataset has training text.

    Args:
        name: the dataset's name in messages.
        splits: the names of the dataset's splits.

    Raises:
        UserError: no split is called `train`; the message lists the splits.
    """
    if "train" not in splits:
        raise UserError(f"--dataset_name {name}: has no split called train; it has {', '.join(splits)}")


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote this folder."""
    is_dataset = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    return is_dataset or (folder / "dataset_dict.json").is_file()


def load_saved(folder: Path) -> Mapping[str, Any]:
    """Load a dataset that `save_to_disk` wrote; a dataset without splits is all `train`.

    Returns:
        Split name -> `datasets.Dataset`.

    Raises:
        UserError: the dataset cannot be loaded, for any reason.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # as in load_hub
        reason = _reason(_root_cause(error))
        raise UserError(
            f"--dataset_name {folder}: cannot be loaded ({reason}); write it again with save_to_disk"
        ) from error
    if isinstance(saved, datasets.Dataset):
        return {"train": saved}
    splits: Mapping[str, Any] = saved
    return splits


def loading_error(name: str, configuration: str | None, error: Exception) -> UserError:
    """Make the error for a dataset of the Hub that cannot be loaded, with the cause and the fix.

    Args:
        name: the dataset's name.
        configuration: the requested configuration.
        error: the error that `datasets` or its HTTP client raised.
    """
    cause = _root_cause(error)
    listed = _CONFIGURATIONS.search(str(cause).replace("\n", " "))
    if listed is not None:
        available = listed.group(1).replace("'", "")
        if configuration is None:
            return UserError(f"--dataset_name {name}: choose a configuration with --dataset_config_name: {available}")
        return UserError(f"--dataset_config_name {configuration}: {name} has no such configuration; it has {available}")
    if isinstance(cause, ConnectionError):
        fix = "connect this machine, or download the dataset elsewhere and name its folder"
    elif isinstance(cause, FileNotFoundError):
        fix = "check the spelling, or log in with `hf auth login` if it is private or gated"
    else:
        fix = "fix the dataset, or name files with --train_file"
    return UserError(f"--dataset_name {name}: cannot be loaded ({_reason(cause)}); {fix}")


def _root_cause(error: BaseException) -> BaseException:
    """Return the error that `datasets` wrapped in its generic error for a failed file."""
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    return first_line(error).rstrip(".")
