"""Encode text to exactly the tokenizer's ids, in this process or in several."""

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

_SAMPLE_CHARS = 1 << 14

# Characters. Shorter text is encoded without tiktoken, because building and testing that backend takes most of a
# second. The worker processes start at the same time (0.2 s each) and help with it, so they cost no extra time.
_MIN_CHARS_FOR_TIKTOKEN = 1 << 20

# A newline (as itself, as in byte-level vocabularies, or as a byte) before another character.
_SPANS_LINES = re.compile(r"(?:\n|Ċ|<0x0A>)(?!\n|Ċ|<0x0A>)(?s:.)")


class HasText(Protocol):
    """An object with a text to encode; its other attributes belong to the caller."""

    @property
    def text(self) -> str:
        """Text that is encoded by one call."""
        ...


PieceT = TypeVar("PieceT", bound=HasText)


class Encoder:
    """A tokenizer as a function from texts to ids, with the fastest backend that gives the same ids.

    The backends, fastest first: tiktoken with the tokenizer's vocabulary; the `tokenizers` backend of a fast tokenizer
    without the Python objects around it; the tokenizer's call. The first texts decide which one is used. With several
    workers the encoder is a context manager, which ends the worker processes.

    Args:
        tokenizer: the tokenizer whose ids are produced.
        num_workers: processes that encode long texts; 1: this process encodes them; None: one process for each core.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_workers: int | None = 1) -> None:
        self.vocabulary_size = vocabulary_size(tokenizer)
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        self._tiktoken: TiktokenEncoder | None = None
        self._backend_is_tested = self._backend is None
        self._tiktoken_is_tested = self._backend is None
        self._num_workers = num_usable_cpus() if num_workers is None else num_workers
        self._workers: WorkerPool | None = None

    def __enter__(self) -> Encoder:
        """Return the encoder."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the worker processes."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def encode(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """Return the ids of each text, without special tokens around them: uint32 [number of tokens].

        Raises:
            UserError: the tokenizer gave an id that is not below its vocabulary size.
        """
        self.select_backend(texts)
        if self._tiktoken is None:
            return self._encode_checked(texts)
        return self._fill_missing(texts, self._tiktoken.encode(texts))

    def _fill_missing(self, texts: list[str], ids_or_none: list[NDArray[Any] | None]) -> list[NDArray[Any]]:
        """Encode the texts that tiktoken left to the tokenizer."""
        missing = [text for text, ids in zip(texts, ids_or_none, strict=True) if ids is None]
        encoded = iter(self._encode_checked(missing))
        return [next(encoded) if ids is None else ids for ids in ids_or_none]

    def encode_batches(self, batches: Iterable[list[PieceT]]) -> Iterator[tuple[list[PieceT], list[NDArray[Any]]]]:
        """Yield each batch with the ids of its pieces, in the order of the batches.

        With worker processes a few batches are read ahead.

        Args:
            batches: lists of objects with a `text`.

        Yields:
            The batch; and for each piece the ids, uint16 or uint32 [number of tokens].

        Raises:
            UserError: the tokenizer gave an id that is not below its vocabulary size, or a worker was killed.
        """
        pending: deque[tuple[list[PieceT], Callable[[], list[NDArray[Any]]]]] = deque()
        source = iter(batches)
        failure: UserError | None = None
        while True:
            try:
                batch = next(source, None)
            except UserError as error:
                failure = error  # yield the batches before it first
                break
            if batch is None:
                break
            pending.append((batch, self._submit([piece.text for piece in batch])))
            while len(pending) > (0 if self._workers is None else 2 * self._num_workers):
                oldest, wait_for_ids = pending.popleft()
                yield oldest, wait_for_ids()
        for oldest, wait_for_ids in pending:
            yield oldest, wait_for_ids()
        if failure is not None:
            raise failure

    def _submit(self, texts: list[str]) -> Callable[[], list[NDArray[Any]]]:
        """Start to encode the texts in a worker, if there are workers; return the function that waits for the ids."""
        self.select_backend(texts)
        if self._workers is None:
            return partial(self.encode, texts)
        future = self._workers.submit(encode_packed, texts, smallest_dtype(self.vocabulary_size))
        return lambda: self._fill_missing(texts, unpack(*future.result()))

    @property
    def added_tokens(self) -> list[AddedToken]:
        """The tokens that the tokenizer finds before it splits the text into words."""
        return [] if self._backend is None else list(self._backend.get_added_tokens_decoder().values())

    @property
    def has_only_character_tokens(self) -> bool:
        """Whether every token is a character or a part of a character, so that a text can be divided anywhere."""
        if self._backend is None or self._backend.normalizer is not None:
            return False
        added = {token.content for token in self.added_tokens}
        return all(len(token) == 1 or token in added for token in self._backend.get_vocab(with_added_tokens=False))

    @property
    def has_tokens_across_lines(self) -> bool:
        """Whether some token contains a newline and a character after it."""
        return self._backend is None or any(map(_SPANS_LINES.search, self._backend.get_vocab(with_added_tokens=True)))

    def splits_at(self, boundary: re.Pattern[str], text: str) -> bool:
        """Return whether the tokenizer's pre-tokenizer, which ignores the vocabulary, splits at every boundary.

        Args:
            boundary: matches the empty string at each boundary.
            text: a sample; False if it has no boundary, which would prove nothing.
        """
        if self._backend is None or self._backend.pre_tokenizer is None:
            return False
        words = self._backend.pre_tokenizer.pre_tokenize_str(text[:_SAMPLE_CHARS])
        edges = {edge for _, span in words for edge in span}
        positions = [match.start() for match in boundary.finditer(text[:_SAMPLE_CHARS])]
        return bool(positions) and edges.issuperset(positions)

    def select_backend(self, texts: list[str]) -> None:
        """Test, once for each backend, whether it gives the tokenizer's ids. `encode` calls this itself.

        Args:
            texts: texts like those that will be encoded, and about as many.
        """
        if self._backend_is_tested and self._tiktoken_is_tested:
            return
        is_long = sum(map(len, texts)) >= _MIN_CHARS_FOR_TIKTOKEN
        if self._backend_is_tested and not is_long:
            return
        sample = [*EDGE_CASES, *(text[:_SAMPLE_CHARS] for text in texts[:16])]
        expected = self._encode_with_tokenizer(sample)
        if not self._backend_is_tested:
            self._backend_is_tested = True
            if not _are_equal(self._encode_with_backend(sample), expected):
                self._backend = None
                self._tiktoken_is_tested = True
        if not self._tiktoken_is_tested and is_long:
            self._tiktoken_is_tested = True
            self._workers = _start_workers(self._num_workers)
            self._test_tiktoken(sample, expected)
            if self._workers is not None and self._tiktoken is not None:
                self._workers.share(self._tiktoken)
            else:
                # The backend of `tokenizers` has its own threads.
                self.__exit__()

    def _test_tiktoken(self, sample: list[str], expected: list[NDArray[np.uint32]]) -> None:
        assert self._backend is not None
        try:
            candidate = TiktokenEncoder(
                self._backend, split_special_tokens=self._tokenizer.split_special_tokens, workers=self._workers
            )
        except UnsuitableError as reason:
            log.debug("not encoding with tiktoken: %s", reason)
            return
        # None: a text that tiktoken leaves to the tokenizer.
        results = zip(candidate.encode(sample), expected, strict=True)
        if all(ids is None or np.array_equal(ids, expected_ids) for ids, expected_ids in results):
            # No check against the vocabulary size is needed: the ids come from the vocabulary.
            self._tiktoken = candidate
        else:
            log.warning("tiktoken gives other ids than the tokenizer: encoding with the tokenizer's backend instead")

    def _encode_checked(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """Encode without tiktoken, and check the ids against the vocabulary size."""
        if not texts:
            return []
        encoded = self._encode_with_tokenizer(texts) if self._backend is None else self._encode_with_backend(texts)
        largest = max((int(ids.max()) for ids in encoded if ids.size), default=-1)
        if largest >= self.vocabulary_size:
            raise UserError(
                f"the tokenizer gives id {largest} but has {self.vocabulary_size} tokens;"
                " its files do not belong together: name another --tokenizer_name"
            )
        return encoded

    def _encode_with_backend(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        assert self._backend is not None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = self._tokenizer.split_special_tokens
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _encode_with_tokenizer(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        # verbose=False: no warning for a text that is longer than the model's context, which is intended here.
        encoding = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.array(ids, dtype=np.uint32) for ids in encoding["input_ids"]]


def _start_workers(num_workers: int) -> WorkerPool | None:
    """Start the worker processes; None for one worker, or with a warning if no process can be started."""
    if num_workers <= 1:
        return None
    try:
        return WorkerPool(num_workers)
    except OSError as error:
        log.warning("tokenizing in one process: no other can be started (%s)", error)
        return None


def _are_equal(encoded: list[NDArray[np.uint32]], expected: list[NDArray[np.uint32]]) -> bool:
    return all(map(np.array_equal, encoded, expected))


def smallest_dtype(vocabulary_size: int) -> str:
    """Return `uint16` or `uint32`: the smaller type that holds every id."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a size that is larger than every id, also if the ids have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


@contextmanager
def encoding_threads(num_threads: int | None) -> Iterator[None]:
    """Set the number of threads of fast tokenizers while the block runs.

    The thread pool of `tokenizers` is created at its first use and keeps its size: in a process that has tokenized
    before, only the number 1 has an effect.

    Args:
        num_threads: the number; None: one for each core, or as TOKENIZERS_PARALLELISM says if it is set.
    """
    variables = {"TOKENIZERS_PARALLELISM": "false" if num_threads == 1 else "true"}
    if num_threads is not None:
        variables["RAYON_NUM_THREADS"] = str(num_threads)
    elif "TOKENIZERS_PARALLELISM" in os.environ:
        variables = {}
    previous = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is not None:
                os.environ[name] = value
            elif name == "RAYON_NUM_THREADS":
                del os.environ[name]
        # TOKENIZERS_PARALLELISM stays set: without it, tokenizers warns in every process that is forked later.
