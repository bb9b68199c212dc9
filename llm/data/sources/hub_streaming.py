"""Datasets of the HuggingFace Hub that are read while they are downloaded; no file is kept on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import blake2b
from typing import Any

from llm.config.errors import UserError, first_line
from llm.config.options import DataOptions
from llm.data.sources.corpus import Corpus
from llm.data.sources.documents import RowSource
from llm.data.sources.hub_datasets import loading_error, require_train_split
from llm.data.sources.readers import missing_column_error
from llm.hub.connection import names_on_hub

# Increase this number when the same dataset starts to give another text.
_FORMAT = 1


def _read_column(name: str, table: Any, column: str) -> Iterator[object]:
    """Yield the text column of a `datasets.IterableDataset`, None for rows without it."""
    rows = iter(table)
    is_first = True
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the library raises many types, also those of its HTTP client
            raise UserError(
                f"dataset {name}: the download stopped ({first_line(error)}); start the same command again: it resumes"
            ) from error
        if is_first and column not in row:
            raise missing_column_error(f"dataset {name}", column, row)
        is_first = False
        yield row.get(column)


def is_hub_dataset(name: str | None) -> bool:
    """Return whether only the Hub can resolve the name of a dataset; see `names_on_hub`."""
    return bool(names_on_hub([name]))


def open_streaming_corpus(options: DataOptions, revision: str | None = None) -> Corpus:
    """Open the text of a Hub dataset at a revision, without reading it.

    The validation text is the split `validation`; if there is none, a hash of each document decides its split,
    because a stream cannot be read twice to find a split point.

    Args:
        options: the dataset's name, configuration and text column, and the share to hold out.
        revision: a commit of the dataset; None for the newest.

    Raises:
        UserError: there is no such dataset or configuration, the Hub cannot be reached, or the dataset has no split
            `train`.
    """
    name = str(options.dataset_name)
    configuration = options.dataset_config_name
    splits, revision = load_streaming_dataset(name, configuration, revision)
    require_train_split(name, splits)
    display_name = name if configuration is None else f"{name}/{configuration}"
    column = options.text_column or "text"
    sources = {
        split: RowSource(partial(_read_column, display_name, splits[split], column))
        for split in ("train", "validation")
        if split in splits
    }
    percentage = 0 if "validation" in sources else options.validation_split_percentage
    identity = repr((_FORMAT, name, configuration, revision, column, percentage))
    return Corpus(
        name=display_name,
        fingerprint=blake2b(identity.encode(), digest_size=16).hexdigest(),
        train=sources["train"],
        validation=sources.get("validation"),
        validation_split_percentage=percentage,
        is_streamed=True,
    )


def latest_revision(name: str) -> str:
    """Return the newest commit of a Hub dataset.

    Raises:
        UserError: there is no such dataset, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name).sha)
    except Exception as error:  # as in _read_column
        raise loading_error(name, None, error) from error


def load_streaming_dataset(
    name: str, configuration: str | None, revision: str | None = None
) -> tuple[Mapping[str, Any], str]:
    """Open a Hub dataset as a stream.

    Args:
        name: the dataset's name.
        configuration: one of the dataset's configurations.
        revision: a commit of the dataset; None for the newest.

    Returns:
        The splits by name, each a `datasets.IterableDataset`; and their commit.

    Raises:
        UserError: there is no such dataset or configuration, or the Hub cannot be reached.
    """
    import datasets

    revision = revision or latest_revision(name)
    try:
        splits: Mapping[str, Any] = datasets.load_dataset(name, configuration, revision=revision, streaming=True)
    except Exception as error:  # as in _read_column
        raise loading_error(name, configuration, error) from error
    return splits, revision
