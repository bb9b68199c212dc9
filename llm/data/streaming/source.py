"""The text of a stream: which text it is, which part of it is held out, and which part is left for training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

from llm.config.options import DataOptions
from llm.data.sources.corpus import Corpus, no_text_error, open_corpus
from llm.data.sources.documents import Skipped, TextChunk, TextSource, utf8_length
from llm.data.sources.hub_streaming import open_streaming_corpus
from llm.data.sources.validation_split import SplitPoint, find_head_split_point, split_at

# Bytes of text. The length of a stream is unknown, so the held-out percentage is one of this many bytes, about two
# shards' worth. From a validation split, this many bytes are taken.
HEAD_BYTES = 32 << 20

# Raise it when the same stream begins to give another text, or another head.
_FORMAT = 1


@dataclass(frozen=True)
class TextStream:
    """A text by name: any process can open it, and nothing is read before that.

    Attributes:
        options: the options that select the text.
        revision: the commit of a Hub dataset; None for other texts.
        head_bytes: number of bytes at the beginning of the text of which a percentage is held out.
    """

    options: DataOptions
    revision: str | None
    head_bytes: int = HEAD_BYTES

    @property
    def name(self) -> str:
        """Name of the text in logs and in the model card."""
        if self.revision is None:
            return self.corpus.name
        name = str(self.options.dataset_name)
        configuration = self.options.dataset_config_name
        return name if configuration is None else f"{name}/{configuration}"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the text and its held-out part depend on; computed without a request to the Hub."""
        options = self.options
        facts = [
            _FORMAT,
            self.head_bytes,
            self.corpus.fingerprint if self.revision is None else [options.dataset_name, options.dataset_config_name],
            self.revision,
            options.text_column,
            options.validation_split_percentage,
        ]
        return blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    @cached_property
    def corpus(self) -> Corpus:
        """The sources of the text; those of a Hub dataset are read while they arrive.

        Raises:
            UserError: the text does not exist or cannot be reached.
        """
        if self.revision is None:
            return open_corpus(self.options)
        return open_streaming_corpus(self.options, self.revision)

    def find_split_point(self) -> SplitPoint | None:
        """Read the head of the text and return where training begins; None if nothing of this text is held out.

        Raises:
            UserError: the text cannot be read, or is empty.
        """
        if self.corpus.validation is not None or self.options.validation_split_percentage == 0:
            return None
        skipped: Skipped = Counter()
        split_point = find_head_split_point(
            self.corpus.train(skipped), self.options.validation_split_percentage, self.head_bytes
        )
        if split_point is None:
            raise no_text_error(self.name, skipped)
        return split_point

    def validation(self, split_point: SplitPoint | None) -> TextSource | None:
        """Return the text for validation: the first `head_bytes` of its own split, else the text before the point."""
        if self.corpus.validation is not None:
            return _Beginning(self.corpus.validation, self.head_bytes)
        return None if split_point is None else _Side(self.corpus.train, split_point, is_head=True)

    def train(self, split_point: SplitPoint | None) -> TextSource:
        """Return the text to train on: everything after the point; None: the whole training split."""
        return self.corpus.train if split_point is None else _Side(self.corpus.train, split_point, is_head=False)

    def __getstate__(self) -> dict[str, object]:
        """Names only: open streams stay in their process."""
        return {name: value for name, value in self.__dict__.items() if name != "corpus"}


@dataclass(frozen=True)
class _Side:
    """The text before a split point (the head), or after it."""

    source: TextSource
    split_point: SplitPoint
    is_head: bool

    def __call__(self, skipped: Skipped) -> Iterator[TextChunk]:
        for split, chunk in split_at(self.source(skipped), self.split_point):
            # `split_at` calls the text before the point "train".
            if (split == "train") == self.is_head:
                yield chunk
            elif self.is_head:
                return


@dataclass(frozen=True)
class _Beginning:
    """The first bytes of a text, and the rest of the chunk in which they end."""

    source: TextSource
    num_bytes: int

    def __call__(self, skipped: Skipped) -> Iterator[TextChunk]:
        num_left = self.num_bytes
        for chunk in self.source(skipped):
            yield chunk
            num_left -= utf8_length(chunk.text)
            if num_left <= 0:
                return
