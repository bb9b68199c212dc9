"""Text to token ids: exactly the tokenizer's own, by one process or several."""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from llm.config.errors import UserError
from llm.system.worker_pool import WorkerPool, num_usable_cpus
from llm.tokenization.split_patterns import EDGE_CASES, UnsuitableError
from llm.tokenization.tiktoken_encoder import TiktokenEncoder, encode_packed, unpack

log = logging.getLogger(__name__)

_SAMPLE_LENGTH = 1 << 14

# Characters. Less text than that is encoded before the faster engine is made and tried, which takes
# most of a second. Processes start meanwhile (0.2 s each) and help with it, so that they cost no time.
_WORTH_LENGTH = 1 << 20


# A newline (itself, of byte-level vocabularies, or as a byte) in front of something else.
_OVER_LINES = re.compile(r"(?:\n|Ċ|<0x0A>)(?!\n|Ċ|<0x0A>)(?s:.)")


class HasText(Protocol):
    """An object with a text to encode; what else it holds is the caller's."""

    @property
    def text(self) -> str:
        """Text that is encoded by one call."""
        ...


PieceT = TypeVar("PieceT", bound=HasText)


class Encoder:
    """A tokenizer as a function from texts to ids, by the fastest engine that gives the same ids.

    That is tiktoken with the tokenizer's own vocabulary, else a fast tokenizer's engine without the
    Python objects around it, else the tokenizer's call. Which one is found out by the first texts.
    Used with several workers it is a context, at whose end its processes end.

    Args:
        tokenizer: whose ids are wanted.
        num_workers: processes that encode long texts, None: one for each core. One is this process.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_workers: int | None = 1) -> None:
        self.vocabulary_size = vocabulary_size(tokenizer)
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        self._merges: TiktokenEncoder | None = None
        self._is_tried = self._backend is None
        self._is_merges_tried = self._backend is None
        self._num_workers = num_usable_cpus() if num_workers is None else num_workers
        self._workers: WorkerPool | None = None

    def __enter__(self) -> Encoder:
        """The encoder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends its processes."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def encode(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, without special tokens around them: uint32 [number of tokens].

        Raises:
            UserError: the tokenizer gave an id beyond its vocabulary.
        """
        self.choose(texts)
        if self._merges is None:
            return self._from_tokenizers(texts)
        return self._completed(texts, self._merges.encode(texts))

    def _completed(self, texts: list[str], quick: list[NDArray[Any] | None]) -> list[NDArray[Any]]:
        """Encodes what the faster engine left to the tokenizer."""
        rest = iter(self._from_tokenizers([text for text, ids in zip(texts, quick, strict=True) if ids is None]))
        return [next(rest) if ids is None else ids for ids in quick]

    def encode_batches(self, batches: Iterable[list[PieceT]]) -> Iterator[tuple[list[PieceT], list[NDArray[Any]]]]:
        """Each batch with the ids of its pieces (uint32 or uint16), in the order of the batches.

        Where processes encode, a few batches are read ahead of their use.

        Raises:
            UserError: the tokenizer gave an id beyond its vocabulary, or a process was killed.
        """
        waiting: deque[tuple[list[PieceT], Callable[[], list[NDArray[Any]]]]] = deque()
        source, failure = iter(batches), None
        while True:
            try:
                batch = next(source, None)
            except UserError as error:
                failure = error  # what was read before it is not lost
                break
            if batch is None:
                break
            waiting.append((batch, self._begin([piece.text for piece in batch])))
            while len(waiting) > (0 if self._workers is None else 2 * self._num_workers):
                begun, ids = waiting.popleft()
                yield begun, ids()
        for begun, ids in waiting:
            yield begun, ids()
        if failure is not None:
            raise failure

    def _begin(self, texts: list[str]) -> Callable[[], list[NDArray[Any]]]:
        """Has a process begin to encode, if there is one; gives what waits for the ids."""
        self.choose(texts)
        if self._workers is None:
            return partial(self.encode, texts)
        made = self._workers.submit(encode_packed, texts, smallest_dtype(self.vocabulary_size))
        return lambda: self._completed(texts, unpack(*made.result()))

    @property
    def added_tokens(self) -> list[AddedToken]:
        """The tokens that are found before the text is split."""
        return [] if self._backend is None else list(self._backend.get_added_tokens_decoder().values())

    @property
    def joins_nothing(self) -> bool:
        """Whether every token is a character, or a part of one, so that a text can be cut anywhere."""
        if self._backend is None or self._backend.normalizer is not None:
            return False
        added = {token.content for token in self.added_tokens}
        return all(len(token) == 1 or token in added for token in self._backend.get_vocab(with_added_tokens=False))

    @property
    def joins_lines(self) -> bool:
        """Whether some token holds a newline and what follows it."""
        return self._backend is None or any(map(_OVER_LINES.search, self._backend.get_vocab(with_added_tokens=True)))

    def splits_at(self, place: re.Pattern[str], text: str) -> bool:
        """Whether the tokenizer splits a text at every such place, whatever its vocabulary is."""
        if self._backend is None or self._backend.pre_tokenizer is None:
            return False
        words = self._backend.pre_tokenizer.pre_tokenize_str(text[:_SAMPLE_LENGTH])
        edges = {edge for _, span in words for edge in span}
        places = [match.start() for match in place.finditer(text[:_SAMPLE_LENGTH])]
        return bool(places) and edges.issuperset(places)  # where there is none, nothing was seen

    def choose(self, texts: list[str]) -> None:
        """Finds out, once for each engine, whether it gives the tokenizer's ids; encoding does so by itself.

        Args:
            texts: of the kind, and about as many, as will be encoded.
        """
        if self._is_tried and (self._is_merges_tried or sum(map(len, texts)) < _WORTH_LENGTH):
            return
        sample = [*EDGE_CASES, *(text[:_SAMPLE_LENGTH] for text in texts[:16])]
        expected = self._from_tokenizer(sample)
        if not self._is_tried:
            self._is_tried = True
            if not _are_equal(self._from_backend(sample), expected):
                self._backend = None
                self._is_merges_tried = True
        if not self._is_merges_tried and sum(map(len, texts)) >= _WORTH_LENGTH:
            self._is_merges_tried = True
            self._workers = _start(self._num_workers)
            self._try_merges(sample, expected)
            if self._workers is not None and self._merges is not None:
                self._workers.share(self._merges)
            else:
                # A tokenizer's own engine has its own threads.
                self.__exit__()

    def _try_merges(self, sample: list[str], expected: list[NDArray[np.uint32]]) -> None:
        assert self._backend is not None
        try:
            merges = TiktokenEncoder(
                self._backend, split_special_tokens=self._tokenizer.split_special_tokens, workers=self._workers
            )
        except UnsuitableError as reason:
            log.debug("the tokenizer's own engine encodes: %s", reason)
            return
        found = merges.encode(sample)
        if _are_equal([due if ids is None else ids for ids, due in zip(found, expected, strict=True)], expected):
            # Its ids are all in the vocabulary: that is where they come from.
            self._merges = merges
        else:
            log.warning("tiktoken gives other ids than the tokenizer, whose own engine encodes instead")

    def _from_tokenizers(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        if not texts:
            return []
        found = self._from_tokenizer(texts) if self._backend is None else self._from_backend(texts)
        largest = max((int(ids.max()) for ids in found if ids.size), default=-1)
        if largest >= self.vocabulary_size:
            raise UserError(
                f"the tokenizer gives id {largest} but has {self.vocabulary_size} tokens;"
                " its files do not belong together: name another --tokenizer_name"
            )
        return found

    def _from_backend(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        assert self._backend is not None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = self._tokenizer.split_special_tokens
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _from_tokenizer(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        # Not verbose: a text longer than the model's context is no mistake here.
        found = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.array(ids, dtype=np.uint32) for ids in found["input_ids"]]


def _start(num_workers: int) -> WorkerPool | None:
    """The processes; None for one worker, and with a warning where there can be none."""
    if num_workers <= 1:
        return None
    try:
        return WorkerPool(num_workers)
    except OSError as error:
        log.warning("tokenizing in one process: no other can be started (%s)", error)
        return None


def _are_equal(found: list[NDArray[np.uint32]], expected: list[NDArray[np.uint32]]) -> bool:
    return all(map(np.array_equal, found, expected))


def smallest_dtype(vocabulary_size: int) -> str:
    """`uint16` or `uint32`: the smaller type that holds every id."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id, so that every id fits, also where a vocabulary has holes."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


@contextmanager
def encoding_threads(number: int | None) -> Iterator[None]:
    """Lets fast tokenizers use so many threads (None: one per core, or what the environment says).

    Their thread pool is made at its first use and keeps its size: in a process that has tokenized
    before, a number other than 1 changes nothing.
    """
    wanted = {"TOKENIZERS_PARALLELISM": "false" if number == 1 else "true"}
    if number is not None:
        wanted["RAYON_NUM_THREADS"] = str(number)
    elif "TOKENIZERS_PARALLELISM" in os.environ:
        wanted = {}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value
            elif name == "RAYON_NUM_THREADS":
                del os.environ[name]
        # TOKENIZERS_PARALLELISM stays set: unset, tokenizers warns in every process forked later.
