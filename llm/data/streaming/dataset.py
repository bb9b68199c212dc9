"""The text of a run with `--streaming`: a process writes shards while the run trains and waits for those it needs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase

from llm.config.errors import Stopped, UsageError, UserError
from llm.config.options import DataOptions, Options
from llm.data.batches.blocks import Blocks, cut_validation
from llm.data.batches.ledger import DOCUMENT_MASK_NOTE, Ledger, ledger
from llm.data.batches.loader import BlockSource, MicroBatches
from llm.data.dataset import StopSignal, TokenizedDataset, bytes_of_ids, prepare_dataset
from llm.data.shards.external_formats import is_token_file
from llm.data.shards.format import MANIFEST, SplitTokens, TokenizedText, open_folder
from llm.data.sources.documents import format_skipped
from llm.data.sources.hub_streaming import is_hub_dataset, latest_revision
from llm.data.streaming.reader import GrowingBlocks, GrowingTokens
from llm.data.streaming.source import TextStream
from llm.data.streaming.writer_process import SHARD_SIZE, StreamJob, StreamWriter, cannot_be_written
from llm.distributed.world import World
from llm.files.lock import locked
from llm.tokenization.encoder import vocabulary_size
from llm.tokenization.load import load_tokenizer
from llm.tokenization.vocabulary import is_character_level, tokenizer_hash

log = logging.getLogger(__name__)

# Shards that the writer may be ahead of training: 134 MB of ids at two bytes each. They last for the minutes in
# which a resumed writer reads the stream up to the point where it continues.
_SHARDS_AHEAD = 16
# Characters of the stream on which `train:bpe` is trained: a quarter of a minute of download at 4 MB/s.
_TOKENIZER_CHARS = 1 << 26


@dataclass(frozen=True)
class StreamingDataset(TokenizedDataset):
    """A text whose training tokens arrive while the run trains on them.

    Attributes:
        name: name of the text in logs and in the model card.
        tokenizer: the tokenizer of the ids.
        text: the ids of both splits; the training tokens are a `GrowingTokens`.
        job: the description of the shards that are written.
        writer: the process that writes; None on ranks other than 0.
        world: the processes that read.
        failures: the errors that ended the stream early.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    text: TokenizedText
    job: StreamJob
    writer: StreamWriter | None
    world: World
    failures: list[UserError]

    def identity(self) -> dict[str, str]:
        """Return the hashes of the text and of the tokenizer, and the commit of a Hub dataset."""
        hashes = {"data_hash": self.text.data_hash, "tokenizer_hash": self.job.tokenizer_hash}
        revision = self.job.text.revision
        pinned = {} if revision is None else {"revision": f"{self.job.text.options.dataset_name}@{revision}"}
        return hashes | pinned

    def blocks(self, block_size: int, *, document_mask: bool) -> tuple[GrowingBlocks, Blocks | None]:
        """Return the training blocks, which are still arriving, and the validation blocks, which are complete."""
        validation = cut_validation(self.text, block_size, document_mask=document_mask)
        return self._blocks(block_size, document_mask=document_mask), validation

    def bytes_of_ids(self) -> tuple[torch.Tensor | None, float]:
        """Count the bytes of the ids on the validation text; int32 [vocabulary] or None, see `bytes_of_ids`."""
        return bytes_of_ids(self.tokenizer, self.text.validation)

    def ledger(self, block_size: int) -> Ledger:
        """Count the tokens that have arrived so far."""
        tokens = self._tokens()
        tokens.refresh()
        return ledger(replace(self.text, train=SplitTokens(tokens, None, None)), block_size)

    def opening_lines(self, blocks: BlockSource, *, num_samples: int, document_mask: bool) -> list[str]:
        """Return the ledger of the held-out text, and the number of blocks that are shuffled together."""
        counts = self.ledger(blocks.block_size)
        note = DOCUMENT_MASK_NOTE if document_mask else ""
        return [
            f"tokens: {counts.validation_tokens:,} held out + {counts.dropped_validation:,} dropped; "
            f"the rest as it arrives, shuffled within windows of {self._blocks(blocks.block_size).window:,} blocks"
            f"{note}"
        ]

    def num_unreached_tokens(self, blocks: BlockSource, num_samples: int) -> int:
        """Return the number of tokens that arrived in blocks that a run of `num_samples` blocks did not read."""
        return max(0, self.ledger(blocks.block_size).train_tokens - 1 - num_samples * blocks.block_size)

    def closing_lines(self, blocks: BlockSource, num_samples: int) -> list[str]:
        """Return log lines: the arrived tokens by what became of them, and the skipped rows.

        Args:
            blocks: the training blocks of the run.
            num_samples: blocks that the whole run reads.
        """
        counts = self.ledger(blocks.block_size)
        unreached = self.num_unreached_tokens(blocks, num_samples)
        return [
            f"tokens that arrived: {counts.train_tokens - unreached:,} trained on + {unreached:,} not reached + "
            f"{counts.validation_tokens:,} held out + {counts.dropped_train + counts.dropped_validation:,} dropped "
            f"= {counts.total:,}",
            *self._skipped_lines(),
        ]

    def _skipped_lines(self) -> list[str]:
        """Return the rows that were no text; the writer has counted them once the stream has ended."""
        folder = self.job.folder.train
        skipped = open_folder(folder).skipped if (folder / MANIFEST).is_file() else {}
        return [f"skipped on the way: {format_skipped(Counter(dict(skipped)))}"] if skipped else []

    def wait_for_batches(
        self,
        batches: MicroBatches,
        blocks: BlockSource,
        *,
        first_step: int,
        num_steps: int,
        global_batch: int,
        should_stop: Callable[[], bool],
    ) -> MicroBatches:
        """Yield the batches, each requested when its blocks have arrived; see `TokenizedDataset.wait_for_batches`.

        The batches end early, at the same step on all ranks, when a rank was asked to stop while all waited, or when
        the stream failed (see `check`).
        """
        assert isinstance(blocks, GrowingBlocks)
        # A second reader of the same shards: the one behind `batches` may be in use in a thread.
        watched = self._blocks(blocks.block_size)
        num_samples = num_steps * global_batch
        num_ready = 0
        try:
            for step in range(first_step, num_steps):
                last = (step + 1) * global_batch - 1
                with suppress(OSError):  # all ranks raise it together if they have to wait
                    self._request_shards(watched, last, num_samples)
                if last >= num_ready:
                    num_available = self._wait(watched, last, num_samples, should_stop)
                    if num_available is None:
                        return
                    num_ready = num_available
                self._log_epoch(watched, step, global_batch)
                yield next(batches)
        finally:
            blocks.abandon()
            if self.writer is not None:
                self.writer.close()  # from here on the set of arrived shards is final

    def check(self) -> None:
        """Raise, on every rank, the error that ended the stream early."""
        for error in self.failures:
            raise error

    def _wait(
        self, watched: GrowingBlocks, sample: int, num_samples: int, should_stop: Callable[[], bool]
    ) -> int | None:
        """Wait for a sample; return the number of readable samples, or None on all ranks where the wait was ended."""
        poll = partial(self._poll, watched, sample, num_samples)
        try:
            return self.world.poll_on_main(poll, "the stream", should_stop)
        except UserError as error:
            self.failures.append(error)
            return None

    def _poll(self, watched: GrowingBlocks, sample: int, num_samples: int) -> int | None:
        """Return the number of readable samples if `sample` is one of them; for rank 0."""
        num_ready = watched.refresh()
        if num_ready > sample:
            return num_ready
        assert self.writer is not None
        self.writer.check()
        try:
            self._request_shards(watched, sample, num_samples)
        except OSError as error:
            raise cannot_be_written(self.job.folder.path, error) from error
        return None

    def _request_shards(self, watched: GrowingBlocks, sample: int, num_samples: int) -> None:
        """Let the writer continue up to `_SHARDS_AHEAD` shards ahead of `sample`, but not past the end of the run."""
        if self.writer is None or watched.is_complete:
            return
        of_run = watched.num_shards(num_samples - 1)
        self.job.folder.request(min(watched.num_shards(sample) + _SHARDS_AHEAD, of_run))

    def _log_epoch(self, watched: GrowingBlocks, step: int, global_batch: int) -> None:
        """Log the beginning of each epoch after the first."""
        if not watched.is_complete:
            return
        num_blocks = len(watched)
        epoch = ((step + 1) * global_batch - 1) // num_blocks
        if epoch > max(step * global_batch - 1, 0) // num_blocks:
            log.info(
                "the stream ended after %s blocks: epoch %d begins, shuffled as a whole", f"{num_blocks:,}", epoch + 1
            )

    def _tokens(self) -> GrowingTokens:
        return _growing_tokens(self.job)

    def _blocks(self, block_size: int, *, document_mask: bool = False) -> GrowingBlocks:
        size = self.text.vocabulary_size
        return GrowingBlocks(self._tokens(), block_size, vocabulary_size=size, document_mask=document_mask)


@contextmanager
def open_dataset(options: Options, world: World, revision: str | None, stop: StopSignal) -> Iterator[TokenizedDataset]:
    """Yield the tokenizer and the text of a run: tokenized before it starts, or streamed inside the `with` block.

    Args:
        options: the options of the run.
        world: the processes of the run.
        revision: the commit of the Hub dataset on which a resumed run was started; None takes the newest commit.
        stop: interrupts the work.

    Raises:
        Stopped: a stop was requested.
        UserError: the text or the tokenizer is missing or is not of the kind that the options state.
    """
    if not options.data.streaming:
        yield world.main_first("the text", stop.interrupting(lambda: prepare_dataset(options, world)))
        return
    job = _job(options, world, revision, stop)
    with ExitStack() as stack:
        writers: list[StreamWriter] = []
        world.run_on_main(lambda: writers.append(_start_writer(job, stack, clear=options.data.overwrite_cache)))
        writer = writers[0] if writers else None
        if world.poll_on_main(lambda: _poll_split(job, writer), "the held-out text of the stream", stop) is None:
            raise Stopped(stop.reason or "another rank")
        validation = world.main_first("the held-out text", lambda: _held_out(job))
        _log_opening(job, validation)
        text = TokenizedText(
            SplitTokens(_growing_tokens(job), None, None),
            validation,
            skipped={},
            data_hash=job.identity,
            vocabulary_size=vocabulary_size(job.tokenizer),
            dir=job.folder.path,
            name=job.text.name,
        )
        yield StreamingDataset(job.text.name, job.tokenizer, text, job, writer, world, failures=[])


def _growing_tokens(job: StreamJob) -> GrowingTokens:
    return GrowingTokens(job.folder.train, shard_size=job.shard_size, tokenizer_hash=job.tokenizer_hash)


def _job(options: Options, world: World, revision: str | None, stop: StopSignal) -> StreamJob:
    if any(map(is_token_file, options.data.train_file or ())):
        raise UsageError("--streaming reads text, and --train_file holds tokens already; leave --streaming out")
    cache_dir = Path(constants.HF_HOME) / "llm"
    pinned = world.run_on_main(stop.interrupting(lambda: _pinned_revision(options.data, revision)))
    text = TextStream(options.data, pinned)
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


def _pinned_revision(options: DataOptions, revision: str | None) -> str | None:
    """Return the commit of a Hub dataset, `revision` or else the newest; None for other texts."""
    if not is_hub_dataset(options.dataset_name):
        return None
    return latest_revision(str(options.dataset_name)) if revision is None else revision


def _tokenizer(options: Options, text: TextStream, cache_dir: Path) -> PreTrainedTokenizerBase:
    def beginning() -> Iterator[str]:
        num_chars = 0
        for chunk in text.train(text.find_split_point())(Counter()):
            yield chunk.text
            num_chars += len(chunk.text)
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


def _start_writer(job: StreamJob, stack: ExitStack, *, clear: bool) -> StreamWriter:
    """Start the process that writes, after removing all shards if `clear`; `stack` ends the process."""
    folder = job.folder
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        if clear:
            with locked(folder.lock):
                folder.clear()
        folder.request(1)
    except OSError as error:
        raise cannot_be_written(folder.path, error) from error
    writer = StreamWriter(job)
    stack.callback(writer.close)
    return writer


def _poll_split(job: StreamJob, writer: StreamWriter | None) -> bool | None:
    """Return True once the held-out text is written, else None; for rank 0."""
    if job.folder.has_split:
        return True
    assert writer is not None
    writer.check()
    return None


def _held_out(job: StreamJob) -> SplitTokens | None:
    if not job.folder.has_split:
        raise UserError(
            f"--streaming: {job.folder.path}, which rank 0 writes, does not exist on this node: set HF_HOME to a folder"
            " that all nodes share"
        )
    return job.folder.held_out()


def _log_opening(job: StreamJob, validation: SplitTokens | None) -> None:
    revision = job.text.revision
    log.info("stream: %s%s, shards in %s", job.text.name, f" at {revision[:12]}" if revision else "", job.folder.path)
    if validation is None:
        log.info("held out for validation: nothing (--validation_split_percentage, --validation_file)")
        return
    has_validation_split = job.folder.split_point() is None
    log.info(
        "held out for validation: %s, %.3g MB in %s documents",
        "the validation split of the text" if has_validation_split else "the head of the stream",
        (validation.num_bytes or 0) / 1e6,
        f"{validation.num_documents or 0:,}",
    )
