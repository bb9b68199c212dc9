"""Datasets of the HuggingFace Hub read as they arrive: nothing is kept on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from llm.config.errors import UserError, first_line
from llm.config.options import DataOptions
from llm.data.sources.corpus import Corpus
from llm.data.sources.documents import Skipped, TextChunk, rows_to_documents
from llm.data.sources.hub_datasets import loading_error
from llm.data.sources.readers import missing_column_error
from llm.hub.connection import names_on_hub

# Raised when the same dataset begins to give another text.
_FORMAT = 1


@dataclass(frozen=True)
class StreamRows:
    """One split of a streamed dataset: a `Source` when called.

    Attributes:
        name: what messages call the dataset.
        table: a `datasets.IterableDataset`.
        column: the column that holds the text.
    """

    name: str
    table: Any
    column: str

    def __call__(self, skipped: Skipped) -> Iterator[TextChunk]:
        """The documents that the rows form; see `rows_to_documents`."""
        return rows_to_documents(self._rows(), skipped)

    def _rows(self) -> Iterator[object]:
        rows = iter(self.table)
        first = True
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the library raises many kinds, and those of its HTTP client
                raise UserError(
                    f"dataset {self.name}: the stream broke ({first_line(error)});"
                    " start the same command again, it continues"
                ) from error
            if first and self.column not in row:
                raise missing_column_error(f"dataset {self.name}", self.column, row)
            first = False
            yield row.get(self.column)


def is_hub_dataset(name: str | None) -> bool:
    """Whether a dataset's name is one of the Hub, and nothing on this machine."""
    return bool(names_on_hub([name]))


def open_streaming_corpus(options: DataOptions, revision: str | None = None) -> Corpus:
    """The text of a Hub dataset, of a revision, or of the one that is the newest now.

    Validation text is the split of that name, else the documents whose hash says so: a stream cannot be
    read twice to find where its last part begins.

    Raises:
        UserError: there is no such dataset or configuration, it cannot be reached, or has no split `train`.
    """
    name, configuration = str(options.dataset_name), options.dataset_config_name
    splits, revision = load_streaming_dataset(name, configuration, revision)
    if "train" not in splits:
        raise UserError(f"--dataset_name {name}: has no split called train; it has {', '.join(splits)}")
    shown = name if configuration is None else f"{name}/{configuration}"
    column = options.text_column or "text"
    sources = {split: StreamRows(shown, splits[split], column) for split in ("train", "validation") if split in splits}
    percentage = 0 if "validation" in sources else options.validation_split_percentage
    facts = repr((_FORMAT, name, configuration, revision, column, percentage))
    fingerprint = blake2b(facts.encode(), digest_size=16).hexdigest()
    return Corpus(shown, fingerprint, sources["train"], sources.get("validation"), percentage, is_streamed=True)


def latest_revision(name: str) -> str:
    """The commit that a Hub dataset is at now.

    Raises:
        UserError: there is no such dataset, or it cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name).sha)
    except Exception as error:  # as above
        raise loading_error(name, None, error) from error


def load_streaming_dataset(
    name: str, configuration: str | None, revision: str | None = None
) -> tuple[Mapping[str, Any], str]:
    """The splits of a Hub dataset, each a `datasets.IterableDataset`, and the commit they are of.

    Args:
        name: the dataset's.
        configuration: one of its configurations.
        revision: a commit; None for the newest.

    Raises:
        UserError: there is no such dataset or configuration, or it cannot be reached.
    """
    import datasets

    revision = revision or latest_revision(name)
    try:
        splits: Mapping[str, Any] = datasets.load_dataset(name, configuration, revision=revision, streaming=True)
    except Exception as error:  # as above
        raise loading_error(name, configuration, error) from error
    return splits, revision
