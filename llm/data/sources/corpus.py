"""The text of a run: its sources, and which part is held out for validation."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

from llm.config.errors import UsageError, UserError
from llm.config.options import DataOptions
from llm.data.sources import python_library
from llm.data.sources.documents import Skipped, Split, TextChunk, TextSource, format_skipped
from llm.data.sources.files import TextFile, find_split_files, resolve_files
from llm.data.sources.hub_datasets import is_saved, load_hub, load_saved, require_train_split, table_source
from llm.data.sources.readers import FileSource
from llm.data.sources.validation_split import SplitPoint, find_split_point, split_at, split_by_hash

log = logging.getLogger(__name__)

LoadHub: TypeAlias = Callable[[str, str | None], Mapping[str, Any]]

# Increase this number when the same sources start to give another text.
_FORMAT = 1

_LONGEST_NAME = 120


@dataclass(frozen=True)
class Corpus:
    """A text in two splits, read from its beginning each time it is used.

    Attributes:
        name: the text's name in messages.
        fingerprint: hash of names, sizes, times of change and options; it changes when the text may have changed.
        train: the text for training, or the whole text when `validation` is None.
        validation: separate validation text; None if there is none.
        validation_split_percentage: percentage of the text to hold out when `validation` is None; 0 for none.
        file_bytes: size of the files in bytes if that is about the size of the text; else None.
        is_streamed: whether the text must not be read twice, so that documents are held out by their hash.
    """

    name: str
    fingerprint: str
    train: TextSource
    validation: TextSource | None
    validation_split_percentage: float
    file_bytes: int | None = None
    is_streamed: bool = False

    def chunks(self, skipped: Skipped) -> Iterator[tuple[Split, TextChunk]]:
        """Yield the whole text: first all of the split `train`, then all of `validation`.

        A document that is divided between the splits ends in `validation` only. A streamed text without separate
        validation text is yielded in its own order, each document in the split that its hash decides.

        Args:
            skipped: counts the rows that hold no text.

        Raises:
            UserError: a source is broken, or holds no text.
        """
        if self.validation is not None:
            yield from (("train", chunk) for chunk in self.train(skipped))
            yield from (("validation", chunk) for chunk in self.validation(skipped))
        elif self.validation_split_percentage == 0:
            yield from (("train", chunk) for chunk in self.train(skipped))
        elif self.is_streamed:
            yield from split_by_hash(self.train(skipped), self.validation_split_percentage)
        else:
            yield from split_at(self.train(skipped), self._split_point)

    def texts(self, *, include_validation: bool = False) -> Iterator[str]:
        """Yield the training text, to train a tokenizer on, in chunks of a document (about a megabyte, or one row).

        Args:
            include_validation: yield the validation text too, in the order of `chunks`.

        Raises:
            UserError: a source is broken, or holds no text.
        """
        for split, chunk in self.chunks(Counter()):
            if split == "validation" and not include_validation:
                if self.is_streamed:
                    continue
                return
            if chunk.text:
                yield chunk.text

    @property
    def num_bytes(self) -> int | None:
        """Exact or approximate number of UTF-8 bytes of the whole text; None if it is unknown before reading."""
        split_point = self.__dict__.get("_split_point")
        return self.file_bytes if split_point is None else int(split_point.num_bytes)

    @cached_property
    def _split_point(self) -> SplitPoint:
        """Read the whole text once to find where the held-out end begins."""
        skipped: Skipped = Counter()
        split_point = find_split_point(self.train(skipped), self.validation_split_percentage)
        if split_point is None:
            raise no_text_error(self.name, skipped)
        num_documents = split_point.num_documents
        documents = f" ({num_documents - split_point.document} of {num_documents} documents)"
        log.info(
            "held out for validation: the last %.3g %% of the text%s",
            split_point.share,
            documents if num_documents > 1 else "",
        )
        return split_point


def no_text_error(name: str, skipped: Skipped) -> UserError:
    """Make the error for a source that holds no text, with the counts of skipped rows."""
    return UserError(f"{name}: holds no text (skipped {format_skipped(skipped)}); name another")


def open_corpus(options: DataOptions, *, load_hub: LoadHub = load_hub) -> Corpus:
    """Find the text that the options name, without reading it.

    Args:
        options: names of the text, and the percentage to hold out.
        load_hub: loads a dataset of the Hub by name and configuration.

    Raises:
        UserError: a named file, folder or dataset is missing, empty, of an unknown kind, or cannot be read.
        UsageError: validation text is named, but no training text.
    """
    name = options.dataset_name
    if name is None and options.train_file is not None:
        return _files_corpus(options, options.train_file)
    if name is None and options.validation_file is not None:
        raise UsageError("--validation_file is given without a text to train on; add --train_file FILE")
    if name is not None and (options.train_file or options.validation_file):
        log.warning("--dataset_name %s is used; --train_file and --validation_file are not", name)
    if name is None:
        log.info("no data named: training on %s", python_library.NAME)
        return _python_corpus(options)
    if name.startswith("builtin:"):
        if name != python_library.NAME:
            raise UserError(f"--dataset_name {name}: no such built-in text; there is {python_library.NAME}")
        return _python_corpus(options)
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return _folder_corpus(options, folder)
    if folder.is_file():
        raise UserError(f"--dataset_name {name}: is a file; give it as --train_file")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise UserError(f"--dataset_name {name}: no such folder; check the path")
    return _table_corpus(options, name, load_hub(name, options.dataset_config_name))


def _python_corpus(options: DataOptions) -> Corpus:
    percentage = options.validation_split_percentage
    train, validation = python_library.open_python_library(percentage)
    identity = [train.identity, validation.identity if validation else None]
    return make_corpus(options, python_library.NAME, train, validation, identity)


def _files_corpus(options: DataOptions, train_file: tuple[str, ...]) -> Corpus:
    train = resolve_files(train_file, "--train_file")
    validation = resolve_files(options.validation_file or (), "--validation_file")
    shared = {file.path.resolve() for file in train} & {file.path.resolve() for file in validation}
    if shared:
        log.warning("these validation files are also training files: %s", ", ".join(map(str, shared)))
    name = ", ".join(file.path.name for file in train)
    if len(name) > _LONGEST_NAME:
        name = f"{len(train)} files: {name[: _LONGEST_NAME - 20]}..."
    return _corpus_of_files(options, name, train, validation)


def _folder_corpus(options: DataOptions, folder: Path) -> Corpus:
    name = str(options.dataset_name)
    if options.dataset_config_name is not None:
        log.warning("--dataset_config_name is not used: %s is a folder", name)
    if is_saved(folder):
        return _table_corpus(options, name, load_saved(folder))
    splits = find_split_files(folder)
    return _corpus_of_files(options, name, splits["train"], splits["validation"])


def _corpus_of_files(
    options: DataOptions,
    name: str,
    train: tuple[TextFile, ...],
    validation: tuple[TextFile, ...],
) -> Corpus:
    def source(files: tuple[TextFile, ...]) -> FileSource:
        return FileSource(files, options.text_column, not options.no_keep_linebreaks)

    corpus = make_corpus(
        options,
        name,
        source(train),
        source(validation) if validation else None,
        [[file.identity for file in files] for files in (train, validation)],
    )
    is_plain = all(file.compression is None and file.kind != "parquet" for file in (*train, *validation))
    return replace(corpus, file_bytes=sum(file.num_bytes for file in (*train, *validation)) if is_plain else None)


def _table_corpus(options: DataOptions, name: str, splits: Mapping[str, Any]) -> Corpus:
    require_train_split(name, splits)
    if options.dataset_config_name is not None:
        name = f"{name}/{options.dataset_config_name}"
    tables = {split: splits[split] for split in ("train", "validation") if split in splits}
    sources = {split: table_source(name, table, options.text_column) for split, table in tables.items()}
    # The fingerprint that `datasets` gives a table: a hash of its origin and of all changes to it.
    identity = {split: table._fingerprint for split, table in tables.items()}
    return make_corpus(options, name, sources["train"], sources.get("validation"), identity)


def make_corpus(
    options: DataOptions, name: str, train: TextSource, validation: TextSource | None, identity: object
) -> Corpus:
    """Make a corpus of two sources.

    Args:
        options: the percentage to hold out, and what else decides the text.
        name: the text's name in messages.
        train: the text for training, or the whole text.
        validation: separate validation text; None if there is none.
        identity: a JSON value that changes when the text of the sources may have changed.
    """
    percentage = 0 if validation is not None else options.validation_split_percentage
    key = [_FORMAT, identity, options.text_column, options.no_keep_linebreaks, percentage]
    fingerprint = blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
    return Corpus(name, fingerprint, train, validation, percentage)
