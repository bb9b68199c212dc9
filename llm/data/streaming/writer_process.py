"""The process that writes the shards of a stream behind the training."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FrameType
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from llm.config.errors import UserError
from llm.data.preparation.tokenize import write_shards
from llm.data.shards.format import MANIFEST, VERSION
from llm.data.sources.corpus import Corpus
from llm.data.sources.documents import Skipped, TextChunk, TextSource
from llm.data.streaming.shard_folder import StreamFolder
from llm.data.streaming.source import TextStream
from llm.files.lock import Lock, LockLostError, locked, release_all
from llm.system.subprocesses import Process
from llm.tokenization.encoder import encoding_threads

# Tokens. Some 18 MB of text, which arrive in seconds, so that training starts soon; and still 4,096 blocks of
# 1,024 tokens to shuffle.
SHARD_SIZE = 1 << 22

# Bytes of text between two looks at what is wanted.
_BYTES_BETWEEN_LOOKS = 1 << 20
_LOOK_SECONDS = 0.5
_END_SECONDS = 5.0
# So long after its death a writer that said nothing is taken for killed: what killed it may stop this process too.
_MOURNING_SECONDS = 2.0

# How a writer ended: all is written, or the cause in one line and an exit code.
_End: TypeAlias = tuple[str, int] | None


@dataclass(frozen=True)
class StreamJob:
    """What is written, and where.

    Attributes:
        text: the stream.
        tokenizer: gives the ids.
        tokenizer_hash: of its behaviour.
        eos_in_single_text: whether a split that is one document ends with the end-of-text token, too.
        cache_dir: the folder of all tokenized text.
        shard_size: tokens of a shard.
        num_workers: processes that tokenize; None for this one.
    """

    text: TextStream
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    eos_in_single_text: bool
    cache_dir: Path
    shard_size: int
    num_workers: int | None

    @property
    def identity(self) -> str:
        """A hash of all that the shards depend on, but for the tokenizer."""
        facts = [VERSION, "stream", self.text.fingerprint, self.shard_size, self.eos_in_single_text]
        return blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    @property
    def folder(self) -> StreamFolder:
        """Where the shards lie."""
        facts = f"{self.identity} {self.tokenizer_hash}"
        return StreamFolder(self.cache_dir / f"stream-{blake2b(facts.encode(), digest_size=16).hexdigest()}")

    def write(self, check: Callable[[], object]) -> None:
        """Writes what is not there yet, up to what is wanted, until the stream ends.

        Args:
            check: called before anything is written; what it raises ends the work.

        Raises:
            UserError: the text cannot be read or holds nothing.
            OSError: the folder cannot be written.
        """
        folder = self.folder
        if not folder.is_settled:
            cut = self.text.find_head()
            source = self.text.held_out(cut)
            if source is not None:
                self._write(source, folder.validation, check)
            check()
            folder.settle(cut, has_text=source is not None)
        # With all that is wanted there, the text is not even opened: it may be out of reach.
        while folder.has_requested():
            if (folder.train / MANIFEST).is_file():
                return
            time.sleep(_LOOK_SECONDS)
        self._write(_Paced(self.text.rest(folder.cut()), folder), folder.train, check)

    def _write(self, source: TextSource, folder: Path, check: Callable[[], object]) -> None:
        if (folder / MANIFEST).is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        # One, or text that has arrived would wait with the processes for text that has not.
        num_workers = self.num_workers or 1
        with encoding_threads(num_workers):
            write_shards(
                Corpus(self.text.name, self.text.fingerprint, source, None, 0, is_streamed=True),
                self.tokenizer,
                folder,
                tokenizer_hash=self.tokenizer_hash,
                shard_size=self.shard_size,
                eos_in_single_text=self.eos_in_single_text,
                num_workers=num_workers,
                check=check,
            )


@dataclass(frozen=True)
class _Paced:
    """A text that goes on only as far as shards are wanted."""

    source: TextSource
    folder: StreamFolder

    def __call__(self, skipped: Skipped) -> Iterator[TextChunk]:
        unlooked = 0
        for part in self.source(skipped):
            unlooked += len(part.text)
            if unlooked >= _BYTES_BETWEEN_LOOKS:
                unlooked = 0
                while self.folder.has_requested():
                    time.sleep(_LOOK_SECONDS)
            yield part


class StreamWriter:
    """The process that writes, as the training process sees it.

    It ends with its parent however that ends, and may be killed at any instant: the next one continues.

    Raises:
        UserError: no process can be started.
    """

    def __init__(self, job: StreamJob) -> None:
        self.folder = job.folder
        self._died: float | None = None
        self._is_done = self._is_closed = False
        self._error: UserError | None = None
        try:
            # Pickled by itself, so that a tokenizer that cannot be read there is told like other mistakes.
            self._process = Process(write_stream, bytes(ForkingPickler.dumps(job)))
        except OSError as error:
            raise UserError(f"--streaming: no process can be started that writes the shards ({error})") from error

    def check(self) -> None:
        """Raises what ended the process; returns if it still writes, or has written all.

        Raises:
            UserError: with the cause and the mend.
        """
        if self._error is None and not self._is_done:
            self._error = self._cause()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Ends the process; once is enough."""
        if self._is_closed:
            return
        self._is_closed = True
        self._process.close_pipe()
        self._process.terminate()  # it may not be at its pipe yet
        self._process.wait(_END_SECONDS)

    def _cause(self) -> UserError | None:
        """What ended the work before its time; None where nothing did, or where it may be too early to say."""
        code = self._process.exit_code
        try:
            if self._process.pipe.poll():
                return self._told(self._process.pipe.recv())
        except (EOFError, OSError):
            pass  # not a word
        if code is None:
            return None
        now = time.monotonic()
        self._died = self._died or now
        if now - self._died < _MOURNING_SECONDS:
            return None
        message = f"the process that writes the stream's shards was killed (exit code {code})"
        return UserError(f"{message}; start again: it continues")

    def _told(self, end: _End) -> UserError | None:
        self._is_done = end is None
        if end is None:
            return None
        message, code = end
        error = UserError(message)
        error.exit_code = code
        return error


def cannot_be_written(folder: Path, error: OSError) -> UserError:
    """The refusal of a folder for shards."""
    return UserError(
        f"the token cache {folder} cannot be written ({error.strerror or error});"
        " make room, or set HF_HOME to another folder, and start again: it continues"
    )


def write_stream(pipe: Connection, job: bytes) -> None:
    """The life of the process; at its end, it tells what ended it.

    Args:
        pipe: closes when the parent ends.
        job: the `StreamJob`, pickled.
    """
    logging.getLogger("llm").addHandler(logging.NullHandler())  # the training process says what matters

    def leave(*_: int | FrameType | None) -> None:
        # Unfinished shards have names that nobody reads. Only the lock would keep others waiting.
        release_all()
        os._exit(1)

    def watch() -> None:
        with suppress(EOFError, OSError):
            pipe.recv_bytes()
        leave()

    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=watch, name="parent", daemon=True).start()
    end = _write(job)
    with suppress(OSError):  # nobody is left to tell
        pipe.send(end)


def _write(data: bytes) -> _End:
    """Writes the job, and catches what ends it before its time."""
    try:
        job: StreamJob = ForkingPickler.loads(data)
        _silence_libraries()
        try:
            _write_in_turn(job)
        except OSError as error:
            raise cannot_be_written(job.folder.path, error) from error
    except UserError as error:
        return str(error), error.exit_code
    except BaseException as error:
        traceback.print_exc()
        return f"the stream cannot be written: {type(error).__name__}: {error}", 1
    return None


def _write_in_turn(job: StreamJob) -> None:
    """Writes as soon as nobody else does: meanwhile another run's process writes the same shards."""
    while True:
        # Who has lost the lock waits like everybody else.
        with suppress(LockLostError), ExitStack() as stack:
            job.write(_take(job.folder.lock, stack).check)
            return


def _take(lock: Path, stack: ExitStack) -> Lock:
    """Holds the lock as soon as nobody else does."""
    while True:
        try:
            return stack.enter_context(locked(lock))
        except UserError:
            time.sleep(_LOOK_SECONDS)


def _silence_libraries() -> None:
    import datasets

    datasets.disable_progress_bars()
    # What it would say of a broken file is in the one line that the training process raises.
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
