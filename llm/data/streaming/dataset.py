"""The text of a run with `--streaming`: shards are written behind the training, which waits for those it needs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase

from llm.config.errors import Stopped, UsageError, UserError
from llm.config.options import DataOptions, Options
from llm.data.batches.blocks import Blocks, Ledger, cut_validation, ledger
from llm.data.batches.loader import Batch, BlockSource
from llm.data.dataset import TokenizedDataset, prepare_dataset
from llm.data.shards.external_formats import is_token_file
from llm.data.shards.format import MANIFEST, Stream, Streams, open_folder
from llm.data.sources.documents import format_skipped
from llm.data.sources.hub_streaming import is_remote, newest_revision
from llm.data.streaming.reader import GrowingBlocks, GrowingTokens
from llm.data.streaming.source import TextStream
from llm.data.streaming.writer_process import SHARD_SIZE, StreamJob, StreamWriter, cannot_be_written
from llm.distributed.world import World
from llm.files.lock import locked
from llm.tokenization.encoder import vocabulary_size
from llm.tokenization.load import is_character_level, load_tokenizer, tokenizer_hash
from llm.training.checkpoints.external import ExternalCheckpoint
from llm.training.checkpoints.store import Checkpoint
from llm.training.plan import Plan
from llm.training.run_dir.formatting import APART
from llm.training.supervision.stop_signals import StopRequest

log = logging.getLogger(__name__)

# Shards that the writer may be ahead of the training: 134 MB of ids at two bytes each, which bridge the minutes
# that a resumed writer reads the stream up to its place.
_SHARDS_AHEAD = 16
# Characters of the stream that `train:bpe` is trained on: a quarter of a minute's download at 4 MB/s.
_TOKENIZER_CHARS = 1 << 26


@dataclass(frozen=True)
class StreamingDataset(TokenizedDataset):
    """A text whose training tokens are still arriving.

    Attributes:
        job: what is written.
        writer: the process that writes; None on ranks other than 0.
        world: the processes that read.
        failures: what ended the stream before its time.
    """

    job: StreamJob
    writer: StreamWriter | None
    world: World
    failures: list[UserError]

    def identity(self) -> dict[str, str]:
        """What a checkpoint must share with the run that continues it, the commit of a Hub dataset included."""
        revision = self.job.text.revision
        pinned = {} if revision is None else {"revision": f"{self.job.text.options.dataset_name}@{revision}"}
        return super().identity() | pinned

    def cut(self, block_size: int, *, document_mask: bool) -> tuple[GrowingBlocks, Blocks | None]:
        """The blocks for training, which arrive, and those for validation, which are there."""
        validation = cut_validation(self.streams, block_size, document_mask=document_mask)
        return self._blocks(block_size, document_mask=document_mask), validation

    def ledger(self, block_size: int) -> Ledger:
        """Where the tokens are that have arrived so far."""
        tokens = self._tokens()
        tokens.look()
        return ledger(replace(self.streams, train=Stream(tokens, None, None)), block_size)

    def ledger_line(self, block_size: int, *, document_mask: bool) -> str:
        """What is known before the training."""
        known = self.ledger(block_size)
        return (
            f"tokens: {known.validation_tokens:,} held out + {known.dropped_validation:,} dropped; "
            f"the rest as it arrives, shuffled within windows of {self._blocks(block_size).window:,} blocks"
            f"{APART if document_mask else ''}"
        )

    def num_unreached_tokens(self, plan: Plan) -> int:
        """Tokens that arrived in blocks that the run did not read."""
        return max(0, self.ledger(plan.block_size).train_tokens - 1 - plan.num_steps * plan.tokens_per_step)

    def closing_lines(self, plan: Plan) -> list[str]:
        """Where every token went that arrived."""
        found, unreached = self.ledger(plan.block_size), self.num_unreached_tokens(plan)
        return [
            f"tokens that arrived: {found.train_tokens - unreached:,} trained on + {unreached:,} not reached + "
            f"{found.validation_tokens:,} held out + {found.dropped_train + found.dropped_validation:,} dropped "
            f"= {found.total:,}",
            *self._skipped(),
        ]

    def _skipped(self) -> list[str]:
        """What the rows were that are no text, which the writer has counted at the stream's end."""
        folder = self.job.folder.train
        skipped = open_folder(folder).skipped if (folder / MANIFEST).is_file() else {}
        return [f"skipped on the way: {format_skipped(Counter(dict(skipped)))}"] if skipped else []

    def wait_for_batches(
        self,
        batches: Iterator[list[Batch]],
        blocks: BlockSource,
        plan: Plan,
        *,
        first_step: int,
        should_stop: Callable[[], bool],
    ) -> Iterator[list[Batch]]:
        """The batches, each asked for when its blocks are there.

        They end early, on all ranks alike, when one was asked to stop while all waited, or when the stream broke
        (see `check`).
        """
        assert isinstance(blocks, GrowingBlocks)
        # Another reader of the same shards: that of the batches may be at work in a thread.
        watched = self._blocks(plan.block_size)
        num_ready = 0
        try:
            for step in range(first_step, plan.num_steps):
                last = (step + 1) * plan.global_batch - 1
                with suppress(OSError):  # said by all ranks together, if it ever comes to waiting
                    self._want(watched, last, plan)
                if last >= num_ready:
                    found = self._wait(watched, last, plan, should_stop)
                    if found is None:
                        return
                    num_ready = found
                self._say_epoch(watched, step, plan)
                yield next(batches)
        finally:
            blocks.abandon()
            if self.writer is not None:
                self.writer.close()  # what has arrived is now settled

    def check(self) -> None:
        """Raises what ended the stream before its time, on every rank."""
        for error in self.failures:
            raise error

    def _wait(self, watched: GrowingBlocks, sample: int, plan: Plan, should_stop: Callable[[], bool]) -> int | None:
        """How many samples can be read, once that one can; None where the wait ends otherwise, on all ranks."""
        look = partial(self._look, watched, sample, plan)
        try:
            return self.world.poll_on_main(look, "the stream", should_stop)
        except UserError as error:
            self.failures.append(error)
            return None

    def _look(self, watched: GrowingBlocks, sample: int, plan: Plan) -> int | None:
        """How many samples can be read, if that one can; rank 0's."""
        num_ready = watched.look()
        if num_ready > sample:
            return num_ready
        assert self.writer is not None
        self.writer.check()
        try:
            self._want(watched, sample, plan)
        except OSError as error:
            raise cannot_be_written(self.job.folder.path, error) from error
        return None

    def _want(self, watched: GrowingBlocks, sample: int, plan: Plan) -> None:
        """Lets the writer go on in front of the training, but not beyond the run's end."""
        if self.writer is None or watched.is_whole:
            return
        of_run = watched.num_shards(plan.num_steps * plan.global_batch - 1)
        self.job.folder.want(min(watched.num_shards(sample) + _SHARDS_AHEAD, of_run))

    def _say_epoch(self, watched: GrowingBlocks, step: int, plan: Plan) -> None:
        if not watched.is_whole:
            return
        num_blocks = len(watched)
        epoch = ((step + 1) * plan.global_batch - 1) // num_blocks
        if epoch > max(step * plan.global_batch - 1, 0) // num_blocks:
            log.info(
                "the stream ended after %s blocks: epoch %d begins, shuffled as a whole", f"{num_blocks:,}", epoch + 1
            )

    def _tokens(self) -> GrowingTokens:
        job = self.job
        return GrowingTokens(job.folder.train, shard_size=job.shard_size, tokenizer_hash=job.tokenizer_hash)

    def _blocks(self, block_size: int, *, document_mask: bool = False) -> GrowingBlocks:
        size = self.streams.vocabulary_size
        return GrowingBlocks(self._tokens(), block_size, vocabulary_size=size, document_mask=document_mask)


@contextmanager
def open_dataset(
    options: Options, world: World, checkpoint: Checkpoint | ExternalCheckpoint | None, stop: StopRequest
) -> Iterator[TokenizedDataset]:
    """Yields the tokenizer and the text of a run: tokenized before it starts, or streamed while the block runs.

    Args:
        options: of the run.
        world: its processes.
        checkpoint: where it continues; a stream then is the one that it was made on.
        stop: interrupts the work.

    Raises:
        Stopped: it was asked to stop.
        UserError: the text or the tokenizer is not what it was said to be.
    """
    if not options.data.streaming:
        yield world.main_first("the text", stop.interrupting(lambda: prepare_dataset(options, world)))
        return
    job = _job(options, world, checkpoint, stop)
    with ExitStack() as stack:
        writers: list[StreamWriter] = []
        world.run_on_main(lambda: writers.append(_started(job, stack, anew=options.data.overwrite_cache)))
        writer = writers[0] if writers else None
        if world.poll_on_main(lambda: _is_settled(job, writer), "the held-out text of the stream", stop) is None:
            raise Stopped(stop.reason or "another rank")
        validation = world.main_first("the held-out text", lambda: _held_out(job))
        _say(job, validation)
        train = GrowingTokens(job.folder.train, shard_size=job.shard_size, tokenizer_hash=job.tokenizer_hash)
        streams = Streams(
            Stream(train, None, None),
            validation,
            skipped={},
            data_hash=job.identity,
            vocabulary_size=vocabulary_size(job.tokenizer),
            dir=job.folder.path,
            name=job.text.name,
        )
        yield StreamingDataset(job.text.name, job.tokenizer, job.tokenizer_hash, streams, job, writer, world, [])


def _job(
    options: Options, world: World, checkpoint: Checkpoint | ExternalCheckpoint | None, stop: StopRequest
) -> StreamJob:
    if any(map(is_token_file, options.data.train_file or ())):
        raise UsageError("--streaming reads text, and --train_file holds tokens already; leave --streaming out")
    cache_dir = Path(constants.HF_HOME) / "llm"
    text = TextStream(options.data, world.run_on_main(stop.interrupting(lambda: _revision(options.data, checkpoint))))
    tokenizer = world.main_first("the tokenizer", stop.interrupting(lambda: _tokenizer(options, text, cache_dir)))
    return StreamJob(
        text,
        tokenizer,
        tokenizer_hash(tokenizer),
        eos_in_single_text=not is_character_level(tokenizer),
        cache_dir=cache_dir / "tokens",
        shard_size=SHARD_SIZE,
        num_workers=options.data.preprocessing_num_workers,
    )


def _revision(options: DataOptions, checkpoint: Checkpoint | ExternalCheckpoint | None) -> str | None:
    """The commit of a Hub dataset: that which the run began with, else the newest."""
    if not is_remote(options.dataset_name):
        return None
    if isinstance(checkpoint, Checkpoint):
        name, _, revision = str(checkpoint.state["identity"].get("revision", "")).rpartition("@")
        if name == options.dataset_name:
            return revision
    return newest_revision(str(options.dataset_name))


def _tokenizer(options: Options, text: TextStream, cache_dir: Path) -> PreTrainedTokenizerBase:
    def beginning() -> Iterator[str]:
        num_chars = 0
        for part in text.rest(text.find_head())(Counter()):
            yield part.text
            num_chars += len(part.text)
            if num_chars >= _TOKENIZER_CHARS:
                log.info("the tokenizer is trained on the first %.0f million characters", num_chars / 1e6)
                return

    return load_tokenizer(
        options.tokenizer,
        options.model,
        texts=beginning,
        corpus_fingerprint=blake2b(f"{text.fingerprint} {_TOKENIZER_CHARS}".encode(), digest_size=16).hexdigest(),
        cache_dir=cache_dir,
    )


def _started(job: StreamJob, stack: ExitStack, *, anew: bool) -> StreamWriter:
    """The process that writes; `stack` ends it."""
    folder = job.folder
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        if anew:
            with locked(folder.lock):
                folder.clear()
        folder.want(1)
    except OSError as error:
        raise cannot_be_written(folder.path, error) from error
    writer = StreamWriter(job)
    stack.callback(writer.close)
    return writer


def _is_settled(job: StreamJob, writer: StreamWriter | None) -> bool | None:
    """True once it is known what is held out; rank 0's."""
    if job.folder.is_settled:
        return True
    assert writer is not None
    writer.check()
    return None


def _held_out(job: StreamJob) -> Stream | None:
    if not job.folder.is_settled:
        raise UserError(
            f"--streaming: {job.folder.path}, which rank 0 writes, is not there on this node: set HF_HOME to a folder"
            " that all nodes share"
        )
    return job.folder.held_out()


def _say(job: StreamJob, validation: Stream | None) -> None:
    revision = job.text.revision
    log.info("stream: %s%s, shards in %s", job.text.name, f" at {revision[:12]}" if revision else "", job.folder.path)
    if validation is None:
        log.info("held out for validation: nothing (--validation_split_percentage, --validation_file)")
        return
    own = job.folder.cut() is None
    log.info(
        "held out for validation: %s, %.3g MB in %s documents",
        "validation text of its own" if own else "the head of the stream",
        (validation.num_bytes or 0) / 1e6,
        f"{validation.num_documents or 0:,}",
    )
