"""A text that is trained on as it arrives: which one, what of it is held out, and what is left to train on."""

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

# Bytes of text. The held-out share is one of the first so many, about two shards' worth, since the length of a
# stream is not known; of a validation split of its own, so many are taken.
HEAD_BYTES = 32 << 20

# Raised when the same stream begins to give another text, or another head.
_FORMAT = 1


@dataclass(frozen=True)
class TextStream:
    """A text by its names, so that any process can open it, and nothing of it is read before.

    Attributes:
        options: what the text is.
        revision: the commit of a dataset of the Hub; None for other texts.
        head_bytes: how much of the beginning the held-out share is one of.
    """

    options: DataOptions
    revision: str | None
    head_bytes: int = HEAD_BYTES

    @property
    def name(self) -> str:
        """What people call it."""
        if self.revision is None:
            return self.corpus.name
        name, configuration = str(self.options.dataset_name), self.options.dataset_config_name
        return name if configuration is None else f"{name}/{configuration}"

    @cached_property
    def fingerprint(self) -> str:
        """A hash that changes when the text, or what is held out of it, may have; the Hub is not asked."""
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
        """Its sources; of a dataset of the Hub, as a stream.

        Raises:
            UserError: it cannot be found, or reached.
        """
        if self.revision is None:
            return open_corpus(self.options)
        return open_streaming_corpus(self.options, self.revision)

    def find_head(self) -> SplitPoint | None:
        """Behind which documents training begins; None where none of the text itself is held out.

        Raises:
            UserError: the text cannot be read, or holds nothing.
        """
        if self.corpus.validation is not None or self.options.validation_split_percentage == 0:
            return None
        skipped: Skipped = Counter()
        cut = find_head_split_point(
            self.corpus.train(skipped), self.options.validation_split_percentage, self.head_bytes
        )
        if cut is None:
            raise no_text_error(self.name, skipped)
        return cut

    def held_out(self, cut: SplitPoint | None) -> TextSource | None:
        """The text for validation: its own, up to `head_bytes`, else what lies in front of the cut."""
        if self.corpus.validation is not None:
            return _Beginning(self.corpus.validation, self.head_bytes)
        return None if cut is None else _Side(self.corpus.train, cut, held_out=True)

    def rest(self, cut: SplitPoint | None) -> TextSource:
        """The text to train on: what lies behind the cut."""
        return self.corpus.train if cut is None else _Side(self.corpus.train, cut, held_out=False)

    def __getstate__(self) -> dict[str, object]:
        """Names only: open streams stay in their process."""
        return {name: value for name, value in self.__dict__.items() if name != "corpus"}


@dataclass(frozen=True)
class _Side:
    """What lies on one side of a cut; the held-out side is the one in front of it."""

    source: TextSource
    cut: SplitPoint
    held_out: bool

    def __call__(self, skipped: Skipped) -> Iterator[TextChunk]:
        for split, part in split_at(self.source(skipped), self.cut):
            is_head = split == "train"
            if is_head == self.held_out:
                yield part
            elif self.held_out:
                return


@dataclass(frozen=True)
class _Beginning:
    """The first bytes of a text, and the rest of the part in which they end."""

    source: TextSource
    num_bytes: int

    def __call__(self, skipped: Skipped) -> Iterator[TextChunk]:
        left = self.num_bytes
        for part in self.source(skipped):
            yield part
            left -= utf8_length(part.text)
            if left <= 0:
                return
