"""The process that writes the shards of a stream behind the training, and the folder they lie in.

STREAM/.lock          of the one process that writes, whatever the number of runs that read
STREAM/wanted         how many training shards some run has asked for; the writer stays there
STREAM/held_out.json  what of the text is held out, written when the folder beside it is whole
STREAM/validation/    shards of what is held out
STREAM/train/         shards of the rest, in the order of arrival
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

from transformers import PreTrainedTokenizerBase

from llm.config.errors import UserError
from llm.data.corpus import Corpus
from llm.data.encoding import encoding_threads
from llm.data.held_out import Cut
from llm.data.parts import Part, Skipped, Source
from llm.data.shards import MANIFEST, VERSION, Stream, open_folder, shard_path
from llm.data.text_streams import TextStream
from llm.data.tokenizing import write_shards
from llm.files.atomic import write_text
from llm.files.lock import locked

# Tokens. Some 18 MB of text, which arrive in seconds, so that training starts soon; and still 4,096 blocks of
# 1,024 tokens to shuffle.
SHARD_SIZE = 1 << 22

# Bytes of text between two looks at what is wanted.
_BYTES_BETWEEN_LOOKS = 1 << 20
_LOOK_SECONDS = 0.5
_END_SECONDS = 5.0
# So long after its death a writer that said nothing is taken for killed: what killed it may stop this process too.
_MOURNING_SECONDS = 2.0


@dataclass(frozen=True)
class StreamFolder:
    """The shards of one stream, as one tokenizer makes them."""

    path: Path

    @property
    def lock(self) -> Path:
        """Held by the process that writes."""
        return self.path / ".lock"

    @property
    def train(self) -> Path:
        """The folder of the training shards."""
        return self.path / "train"

    @property
    def validation(self) -> Path:
        """The folder of the held-out shards."""
        return self.path / "validation"

    @property
    def is_settled(self) -> bool:
        """Whether it is known what is held out, and its tokens are there."""
        return self._settled.is_file()

    def held_out(self) -> Stream | None:
        """The tokens of what is held out, once that is settled; None where nothing is.

        Raises:
            ShardError: they are not what they should be.
        """
        facts = json.loads(self._settled.read_text())
        return open_folder(self.validation).train if facts["has_text"] else None

    def settle(self, cut: Cut | None, has_text: bool) -> None:
        """Writes down what is held out."""
        place = None if cut is None else cut._asdict()
        write_text(self._settled, json.dumps({"has_text": has_text, "cut": place}, indent=1) + "\n")

    def cut(self) -> Cut | None:
        """Where training begins, once that is settled."""
        place = json.loads(self._settled.read_text())["cut"]
        return None if place is None else Cut(**place)

    def wanted(self) -> int:
        """Training shards that some run has asked for."""
        try:
            return int((self.path / "wanted").read_text())
        except (OSError, ValueError):
            return 0

    def want(self, num_shards: int) -> None:
        """Asks for so many training shards; whoever asked for more is not forgotten."""
        if self.wanted() < num_shards:
            write_text(self.path / "wanted", f"{num_shards}\n")

    def has_wanted(self) -> bool:
        """Whether all training shards are there that were asked for, or all there are."""
        last = shard_path(self.train, "train", self.wanted() - 1)
        return last.with_suffix(".json").is_file() or (self.train / MANIFEST).is_file()

    def clear(self) -> None:
        """Removes all shards; the lock must be held."""
        self._settled.unlink(missing_ok=True)
        (self.path / "wanted").unlink(missing_ok=True)
        for folder in (self.validation, self.train):
            if folder.exists():
                shutil.rmtree(folder)

    @property
    def _settled(self) -> Path:
        return self.path / "held_out.json"


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

    def write(self) -> None:
        """Writes what is not there yet, up to what is wanted, until the stream ends.

        Raises:
            UserError: the text cannot be read or holds nothing.
            OSError: the folder cannot be written.
        """
        folder = self.folder
        if not folder.is_settled:
            cut = self.text.find_head()
            source = self.text.held_out(cut)
            if source is not None:
                self._write(source, folder.validation)
            folder.settle(cut, has_text=source is not None)
        # With all that is wanted there, the text is not even opened: it may be out of reach.
        while folder.has_wanted():
            if (folder.train / MANIFEST).is_file():
                return
            time.sleep(_LOOK_SECONDS)
        self._write(_Paced(self.text.rest(folder.cut()), folder), folder.train)

    def _write(self, source: Source, folder: Path) -> None:
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
            )


@dataclass(frozen=True)
class _Paced:
    """A text that goes on only as far as shards are wanted."""

    source: Source
    folder: StreamFolder

    def __call__(self, skipped: Skipped) -> Iterator[Part]:
        unlooked = 0
        for part in self.source(skipped):
            unlooked += len(part.text)
            if unlooked >= _BYTES_BETWEEN_LOOKS:
                unlooked = 0
                while self.folder.has_wanted():
                    time.sleep(_LOOK_SECONDS)
            yield part


class StreamWriter:
    """The process that writes, as the training process sees it.

    It is begun anew, not forked, since the training process has threads, and perhaps a device. It ends with
    its parent however that ends, and may be killed at any instant: the next one continues.
    """

    def __init__(self, job: StreamJob) -> None:
        self.folder = job.folder
        self._died: float | None = None
        self._error: UserError | None = None
        self._is_closed = False
        context = multiprocessing.get_context("spawn")
        self._told, teller = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_write, args=(job, os.getpid(), teller), name="stream-writer", daemon=True
        )
        # Started before the signals are held back, which it would let through again.
        resource_tracker.ensure_running()
        # Ctrl-C and a scheduler's warning reach all processes; what they mean is the training process's to say.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGUSR1))
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        teller.close()

    def check(self) -> None:
        """Raises what ended the process; returns if it still writes, or has written all.

        Raises:
            UserError: with the cause and the mend.
        """
        if self._error is None and not self._process.is_alive() and self._process.exitcode != 0:
            self._error = self._cause()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Ends the process; once is enough."""
        if self._is_closed:
            return
        self._is_closed = True
        self._process.terminate()
        self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        self._told.close()

    def _cause(self) -> UserError | None:
        """What a dead process died of; None where it may be too early to say."""
        try:
            message, code = self._told.recv()
        except EOFError:
            now = time.monotonic()
            self._died = self._died or now
            if now - self._died < _MOURNING_SECONDS:
                return None
            message = f"the process that writes the stream's shards was killed (exit code {self._process.exitcode})"
            return UserError(f"{message}; start again: it continues")
        error = UserError(message)
        error.exit_code = code
        return error


def cannot_be_written(folder: Path, error: OSError) -> UserError:
    """The refusal of a folder for shards."""
    return UserError(
        f"the token cache {folder} cannot be written ({error.strerror or error});"
        " make room, or set HF_HOME to another folder, and start again: it continues"
    )


def _write(job: StreamJob, parent: int, teller: Connection) -> None:
    """The life of the process."""
    logging.getLogger("llm").addHandler(logging.NullHandler())  # the training process says what matters
    lock = job.folder.lock
    is_ours = threading.Event()

    def leave(*_: int | FrameType | None) -> None:
        # Unfinished shards have names that nobody reads. Only the lock would keep others waiting.
        if is_ours.is_set():
            lock.unlink(missing_ok=True)
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        leave()

    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=watch, name="parent", daemon=True).start()
    try:
        _silence_libraries()
        with ExitStack() as stack:
            _take(lock, stack)
            is_ours.set()
            stack.callback(is_ours.clear)
            job.write()
    except UserError as error:
        teller.send((str(error), error.exit_code))
        raise SystemExit(1) from error
    except OSError as error:
        teller.send((str(cannot_be_written(job.folder.path, error)), 1))
        raise SystemExit(1) from error
    except BaseException as error:
        teller.send((f"the stream cannot be written: {type(error).__name__}: {error}", 1))
        raise


def _take(lock: Path, stack: ExitStack) -> None:
    """Holds the lock as soon as nobody else does: meanwhile another run's process writes the same shards."""
    while True:
        try:
            stack.enter_context(locked(lock))
            return
        except UserError:
            time.sleep(_LOOK_SECONDS)


def _silence_libraries() -> None:
    import datasets

    datasets.disable_progress_bars()
    # What it would say of a broken file is in the one line that the training process raises.
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
