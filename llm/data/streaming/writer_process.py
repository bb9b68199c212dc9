"""The process that writes the shards of a stream while the run trains."""

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

# Tokens. 4,194,304 tokens are some 18 MB of text, which arrive in seconds, so that training starts soon; and they are
# 4,096 blocks of 1,024 tokens to shuffle.
SHARD_SIZE = 1 << 22

# Bytes of text between two reads of the number of requested shards.
_BYTES_BETWEEN_POLLS = 1 << 20
_POLL_SECONDS = 0.5
_END_SECONDS = 5.0
# Wait this long before reporting a writer that exited without a message as killed: the same signal may be about to
# reach this process.
_EXIT_GRACE_SECONDS = 2.0

# The end of a writer: None after writing everything, else the error in one line and an exit code.
_End: TypeAlias = tuple[str, int] | None


@dataclass(frozen=True)
class StreamJob:
    """The shards to write, and where.

    Attributes:
        text: the stream.
        tokenizer: the tokenizer that makes the ids.
        tokenizer_hash: hash of the tokenizer's behaviour.
        eos_in_single_text: whether a split that is one document ends with the end-of-text token, too.
        cache_dir: the folder of all tokenized text.
        shard_size: tokens of a shard.
        num_workers: processes that tokenize; None: the writer itself.
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
        """Hash of everything that the shards depend on, except the tokenizer."""
        facts = [VERSION, "stream", self.text.fingerprint, self.shard_size, self.eos_in_single_text]
        return blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    @property
    def folder(self) -> StreamFolder:
        """The folder of the shards, named by a hash of the job and of the tokenizer."""
        facts = f"{self.identity} {self.tokenizer_hash}"
        return StreamFolder(self.cache_dir / f"stream-{blake2b(facts.encode(), digest_size=16).hexdigest()}")

    def write(self, check: Callable[[], object]) -> None:
        """Write the shards that do not exist yet, up to the requested number, until the stream ends.

        Args:
            check: called before anything is written; an exception that it raises ends the work.

        Raises:
            UserError: the text cannot be read or is empty.
            OSError: the folder cannot be written.
        """
        folder = self.folder
        if not folder.has_split:
            split_point = self.text.find_split_point()
            source = self.text.validation(split_point)
            if source is not None:
                self._write(source, folder.validation, check)
            check()
            folder.commit_split(split_point, has_text=source is not None)
        # While all requested shards exist, the text is not opened: it may be out of reach.
        while folder.has_requested():
            if (folder.train / MANIFEST).is_file():
                return
            time.sleep(_POLL_SECONDS)
        self._write(_PacedSource(self.text.train(folder.split_point()), folder), folder.train, check)

    def _write(self, source: TextSource, folder: Path, check: Callable[[], object]) -> None:
        if (folder / MANIFEST).is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        # One process by default: with several, text that has arrived would wait in them for text that has not.
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
class _PacedSource:
    """A text that pauses while all requested shards exist."""

    source: TextSource
    folder: StreamFolder

    def __call__(self, skipped: Skipped) -> Iterator[TextChunk]:
        num_chars = 0
        for chunk in self.source(skipped):
            num_chars += len(chunk.text)
            if num_chars >= _BYTES_BETWEEN_POLLS:
                num_chars = 0
                while self.folder.has_requested():
                    time.sleep(_POLL_SECONDS)
            yield chunk


class StreamWriter:
    """The process that writes, as the training process controls it.

    The process ends with its parent, whatever ends the parent. It may be killed at any instant: the next writer
    continues its work.

    Attributes:
        folder: the folder of the shards.
    """

    def __init__(self, job: StreamJob) -> None:
        """Start the process.

        Raises:
            UserError: no process can be started.
        """
        self.folder = job.folder
        self._exit_seen: float | None = None
        self._is_done = False
        self._is_closed = False
        self._error: UserError | None = None
        try:
            # The job is pickled separately, so that a tokenizer that cannot be unpickled there is reported like
            # other errors.
            self._process = Process(write_stream, bytes(ForkingPickler.dumps(job)))
        except OSError as error:
            raise UserError(f"--streaming: no process can be started that writes the shards ({error})") from error

    def check(self) -> None:
        """Return if the process is writing or has written everything; else raise the error that ended it.

        Raises:
            UserError: the cause, and what to do.
        """
        if self._error is None and not self._is_done:
            self._error = self._failure()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the process; further calls have no effect."""
        if self._is_closed:
            return
        self._is_closed = True
        self._process.close_pipe()
        self._process.terminate()  # it may not be reading its pipe yet
        self._process.wait(_END_SECONDS)

    def _failure(self) -> UserError | None:
        """The error that ended the process early; None if there is none, or if it is too early to report one."""
        exit_code = self._process.exit_code
        try:
            if self._process.pipe.poll():
                return self._reported_failure(self._process.pipe.recv())
        except (EOFError, OSError):
            pass  # it exited without a message
        if exit_code is None:
            return None
        now = time.monotonic()
        self._exit_seen = self._exit_seen or now
        if now - self._exit_seen < _EXIT_GRACE_SECONDS:
            return None
        message = f"the process that writes the stream's shards was killed (exit code {exit_code})"
        return UserError(f"{message}; start again: it continues")

    def _reported_failure(self, end: _End) -> UserError | None:
        self._is_done = end is None
        if end is None:
            return None
        message, exit_code = end
        error = UserError(message)
        error.exit_code = exit_code
        return error


def cannot_be_written(folder: Path, error: OSError) -> UserError:
    """Return the error for a folder of shards that cannot be written.

    Args:
        folder: the folder.
        error: the cause.
    """
    return UserError(
        f"the token cache {folder} cannot be written ({error.strerror or error});"
        " make room, or set HF_HOME to another folder, and start again: it continues"
    )


def write_stream(pipe: Connection, job: bytes) -> None:
    """Write the shards of a job and send how the work ended; the main function of the process.

    Args:
        pipe: closes when the parent ends.
        job: the `StreamJob`, pickled.
    """
    logging.getLogger("llm").addHandler(logging.NullHandler())  # the training process logs what matters

    def leave(*_: int | FrameType | None) -> None:
        # Unfinished shards have temporary names, which no reader opens. Only the lock would make others wait.
        release_all()
        os._exit(1)

    def exit_with_parent() -> None:
        with suppress(EOFError, OSError):
            pipe.recv_bytes()
        leave()

    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=exit_with_parent, name="parent", daemon=True).start()
    end = _write(job)
    with suppress(OSError):  # the parent has exited
        pipe.send(end)


def _write(data: bytes) -> _End:
    """Write the job; return the error that ended it early, None after writing everything."""
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
    """Write as soon as no other process does; until then the process of another run writes the same shards."""
    while True:
        # A process that has lost the lock waits for it like any other.
        with suppress(LockLostError), ExitStack() as stack:
            job.write(_wait_for_lock(job.folder.lock, stack).check)
            return


def _wait_for_lock(lock: Path, stack: ExitStack) -> Lock:
    """Take the lock as soon as no other process holds it; `stack` releases it."""
    while True:
        try:
            return stack.enter_context(locked(lock))
        except UserError:
            time.sleep(_POLL_SECONDS)


def _silence_libraries() -> None:
    import datasets

    datasets.disable_progress_bars()
    # The one line that the training process raises says what the library would log about a broken file.
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
