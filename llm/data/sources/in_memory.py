"""Text that a Python program has in memory: strings, or a `datasets.Dataset`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeAlias

from llm.config.errors import UsageError
from llm.config.options import DataOptions
from llm.data.sources.corpus import Corpus, make_corpus, no_text_error
from llm.data.sources.documents import Skipped, TextChunk, TextSource, skip_reason
from llm.data.sources.hub_datasets import table_source

if TYPE_CHECKING:
    from datasets import Dataset

TextInMemory: TypeAlias = "Iterable[str] | Dataset"


@dataclass(frozen=True)
class StringSource:
    """A `TextSource` over strings.

    Attributes:
        texts: the documents.
    """

    texts: tuple[str, ...]

    def __call__(self, skipped: Skipped) -> Iterator[TextChunk]:
        """Yield each string as one document, also one that ends in a newline; count those that hold no text."""
        for text in self.texts:
            if reason := skip_reason(text):
                skipped[reason] += 1
            else:
                yield TextChunk(text, ends=True)


def corpus_in_memory(text: TextInMemory, validation: TextInMemory | None, options: DataOptions) -> Corpus:
    """Make a corpus of strings, each one document, or of the text column of a `datasets.Dataset`.

    Args:
        text: the text for training, or the whole text; an iterable is read once, and kept.
        validation: separate validation text; None: a part of `text` is held out.
        options: the text column, and the percentage to hold out.

    Raises:
        UsageError: one of them is neither strings nor a dataset.
        UserError: the dataset lacks the text column, or no string holds text.
    """
    train = _read("text", text, options)
    held_out = None if validation is None else _read("validation", validation, options)
    corpus = make_corpus(
        options,
        train.name,
        train.source,
        None if held_out is None else held_out.source,
        [train.fingerprint, None if held_out is None else held_out.fingerprint],
    )
    sizes = [part.num_bytes for part in (train, held_out) if part is not None]
    return replace(corpus, file_bytes=None if None in sizes else sum(size or 0 for size in sizes))


@dataclass(frozen=True)
class _Part:
    """One split: its name in messages, its source, its fingerprint, and its UTF-8 bytes, None if unknown."""

    name: str
    source: TextSource
    fingerprint: str
    num_bytes: int | None


def _read(argument: str, text: TextInMemory, options: DataOptions) -> _Part:
    if type(text).__module__.partition(".")[0] == "datasets":
        return _read_dataset(argument, text, options)
    if isinstance(text, str | bytes | dict) or not isinstance(text, Iterable):
        raise UsageError(
            f"{argument}: is a {type(text).__name__}; give a list of strings, each one document, or a datasets.Dataset "
            "(a file is named by TrainOptions(train_file=...))"
        )
    texts = tuple(text)
    skipped: Skipped = Counter()
    digest = blake2b(digest_size=16)
    num_bytes = 0
    for index, document in enumerate(texts):
        if not isinstance(document, str):
            raise UsageError(f"{argument}: item {index} is a {type(document).__name__}; every document must be a str")
        if reason := skip_reason(document):
            skipped[reason] += 1
            continue
        data = document.encode()
        num_bytes += len(data)
        digest.update(len(data).to_bytes(8, "little") + data)
    digest.update(repr(sorted(skipped.items())).encode())
    if not num_bytes:
        raise no_text_error(argument, skipped)
    return _Part(f"{len(texts):,} strings", StringSource(texts), digest.hexdigest(), num_bytes)


def _read_dataset(argument: str, table: Any, options: DataOptions) -> _Part:
    from datasets import Dataset

    if not isinstance(table, Dataset):
        raise UsageError(
            f"{argument}: is a {type(table).__name__}; give a datasets.Dataset, which is one split of a DatasetDict (a "
            'stream is named by TrainOptions(dataset_name="...", streaming=True))'
        )
    name = table.info.dataset_name or argument
    return _Part(name, table_source(name, table, options.text_column), str(table._fingerprint), None)
