"""The text of a run with `--streaming`, as the run sees it: waiting, requests, failures and the ledger."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from huggingface_hub import constants

from llm.config.errors import Stopped, UsageError, UserError
from llm.config.options import DataOptions, Options
from llm.config.reader import read_options
from llm.data.batches.loader import training_batches
from llm.data.preparation.tokenize import write_shards
from llm.data.shards.format import SplitTokens, TokenizedText
from llm.data.sources.corpus import open_corpus
from llm.data.streaming import dataset as module
from llm.data.streaming.dataset import StreamingDataset, open_dataset
from llm.data.streaming.reader import GrowingTokens
from llm.data.streaming.source import TextStream
from llm.data.streaming.writer_process import StreamJob, StreamWriter
from llm.distributed.world import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
SHARD, BLOCK, GLOBAL_BATCH = 400, 16, 4


class Writer:
    """A writer whose shards a test lets arrive, at each check or close."""

    def __init__(self, on_check: Callable[[], None]) -> None:
        self.check = on_check
        self.num_closed = 0

    def close(self) -> None:
        self.num_closed += 1


class Stop:
    """A stop signal that a test sets."""

    reason: str | None = None

    def __call__(self) -> bool:
        return self.reason is not None

    def interrupting(self, work: Callable[[], Any]) -> Callable[[], Any]:
        return work


@pytest.fixture
def job(tmp_path: Path, byte_tokenizer) -> StreamJob:  # type: ignore[no-untyped-def]
    file = tmp_path / "text.txt"
    file.write_text("0123456789" * 300)
    options = DataOptions(train_file=(str(file),), validation_split_percentage=0)
    return StreamJob(TextStream(options, None), byte_tokenizer, "bytes", True, tmp_path / "cache", SHARD, None)


@pytest.fixture
def stream(job: StreamJob, tmp_path: Path) -> Callable[[Callable[[], None]], StreamingDataset]:
    """Makes a dataset without a process: `stream(on_check)`."""

    def stream(on_check: Callable[[], None]) -> StreamingDataset:
        job.folder.path.mkdir(parents=True)
        tokens = GrowingTokens(job.folder.train, shard_size=SHARD, tokenizer_hash="bytes")
        text = TokenizedText(
            SplitTokens(tokens, None, None), None, {}, job.identity, 257, job.folder.path, name=job.text.name
        )
        writer = cast(StreamWriter, Writer(on_check))
        return StreamingDataset(job.text.name, job.tokenizer, text, job, writer, ALONE, failures=[])

    return stream


def _write_all(job: StreamJob) -> None:
    job.folder.train.mkdir(exist_ok=True)
    write_shards(
        open_corpus(job.text.options),
        job.tokenizer,
        job.folder.train,
        tokenizer_hash="bytes",
        shard_size=SHARD,
        eos_in_single_text=True,
        num_workers=1,
    )


def _batches(
    dataset: StreamingDataset, *, num_steps: int, first_step: int = 0, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[list[Any]]:
    blocks, validation = dataset.blocks(BLOCK, document_mask=False)
    assert validation is None
    batches = training_batches(
        blocks,
        seed=1,
        first_step=first_step,
        num_steps=num_steps - first_step,
        micro_batch=GLOBAL_BATCH,
        accumulation=1,
        rank=0,
        num_ranks=1,
        num_workers=0,
    )
    return dataset.wait_for_batches(
        batches,
        blocks,
        first_step=first_step,
        num_steps=num_steps,
        global_batch=GLOBAL_BATCH,
        should_stop=should_stop,
    )


def test_wait_for_batches_when_shards_arrive_late_then_all_steps_and_the_ledger_adds_up(
    job: StreamJob, stream: Callable[..., StreamingDataset]
) -> None:
    dataset = stream(lambda: _write_all(job))
    num_steps = 20
    batches = list(_batches(dataset, num_steps=num_steps))
    assert len(batches) == num_steps
    assert all(batch.ids.shape == (GLOBAL_BATCH, BLOCK) for (batch,) in batches)
    assert cast(Writer, dataset.writer).num_closed == 1
    dataset.check()
    blocks, _ = dataset.blocks(BLOCK, document_mask=False)
    num_read = num_steps * GLOBAL_BATCH
    num_blocks = 3000 // BLOCK  # 3,000 bytes and the end-of-text token
    counts = dataset.ledger(BLOCK)
    assert (counts.total, counts.train_tokens) == (3001, num_blocks * BLOCK + 1)
    assert dataset.num_unreached_tokens(blocks, num_read) == (num_blocks - num_read) * BLOCK
    assert dataset.closing_lines(blocks, num_read) == [
        f"tokens that arrived: {num_read * BLOCK + 1:,} trained on + {(num_blocks - num_read) * BLOCK:,} not reached"
        f" + 0 held out + {3001 - num_blocks * BLOCK - 1} dropped = 3,001"
    ]


def test_wait_for_batches_when_the_run_is_short_then_no_more_shards_are_requested_than_it_reads(
    job: StreamJob, stream: Callable[..., StreamingDataset]
) -> None:
    dataset = stream(lambda: _write_all(job))
    # 40 blocks: two windows of (400 - 1) // 16 = 24 blocks, for which two shards suffice.
    assert len(list(_batches(dataset, num_steps=10))) == 10
    assert job.folder.num_requested() == 2


def test_wait_for_batches_when_the_run_is_long_then_shards_are_requested_ahead(
    job: StreamJob, stream: Callable[..., StreamingDataset]
) -> None:
    dataset = stream(lambda: _write_all(job))
    next(_batches(dataset, num_steps=10_000))
    assert job.folder.num_requested() == 1 + module._SHARDS_AHEAD


def test_wait_for_batches_when_the_writer_fails_then_they_end_and_check_raises(
    stream: Callable[..., StreamingDataset],
) -> None:
    def fail() -> None:
        raise UserError("the text is broken")

    dataset = stream(fail)
    assert list(_batches(dataset, num_steps=5)) == []
    with pytest.raises(UserError, match="the text is broken"):
        dataset.check()
    assert cast(Writer, dataset.writer).num_closed == 1


def test_wait_for_batches_when_a_stop_is_requested_while_waiting_then_they_end_without_a_failure(
    stream: Callable[..., StreamingDataset],
) -> None:
    dataset = stream(lambda: None)
    assert list(_batches(dataset, num_steps=5, should_stop=lambda: True)) == []
    dataset.check()


def test_opening_lines_when_document_mask_then_the_window_and_the_note(
    job: StreamJob, stream: Callable[..., StreamingDataset]
) -> None:
    dataset = stream(lambda: None)
    blocks, _ = dataset.blocks(BLOCK, document_mask=True)
    (line,) = dataset.opening_lines(blocks, num_samples=9, document_mask=True)
    assert line.startswith("tokens: 0 held out + 0 dropped; the rest as it arrives")
    assert "windows of 24 blocks" in line
    assert line.endswith("; document mask: the first token of a document is read, but never predicted")


def test_identity_when_a_hub_dataset_has_a_commit_then_it_is_part_of_it(byte_tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = TextStream(DataOptions(dataset_name="some/set"), "c0ffee")
    job = StreamJob(text, byte_tokenizer, "bytes", True, tmp_path, SHARD, None)
    tokens = SplitTokens(GrowingTokens(tmp_path, shard_size=SHARD, tokenizer_hash="bytes"), None, None)
    content = TokenizedText(tokens, None, {}, job.identity, 257, tmp_path)
    dataset = StreamingDataset("some/set", byte_tokenizer, content, job, None, ALONE, failures=[])
    assert dataset.identity() == {
        "data_hash": job.identity,
        "tokenizer_hash": "bytes",
        "revision": "some/set@c0ffee",
    }


def _options(*arguments: str | Path) -> Options:
    words = [*map(str, arguments), "--streaming", "--max_train_steps", "5"]
    return read_options(Options, words, prog="test", description="")


def test_open_dataset_when_streaming_then_the_head_is_held_out_and_the_process_ends_with_the_block(
    tiny_text: Path, tiny_gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(module, "SHARD_SIZE", 4000)
    options = _options("--train_file", tiny_text, "--tokenizer_name", tiny_gpt2_dir)
    with open_dataset(options, ALONE, None, Stop()) as dataset:
        assert isinstance(dataset, StreamingDataset)
        assert dataset.writer is not None
        _, validation = dataset.blocks(32, document_mask=False)
        assert validation is not None
        # 5 % of the text, which is shorter than the head of a stream.
        assert dataset.ledger(32).validation_tokens // 32 == int(tiny_text.stat().st_size * 0.05) // 32
        process = dataset.writer._process
    assert process.exit_code is not None


def test_open_dataset_when_a_stop_is_requested_then_raised_with_its_reason(
    tiny_text: Path, tiny_gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    stop = Stop()
    stop.reason = "walltime"
    monkeypatch.setattr(module, "_poll_split", lambda job, writer: None)  # the head never arrives
    options = _options("--train_file", tiny_text, "--tokenizer_name", tiny_gpt2_dir)
    with pytest.raises(Stopped, match="walltime"), open_dataset(options, ALONE, None, stop):
        pytest.fail("the text was opened")


def test_open_dataset_when_token_files_are_streamed_then_refused_with_the_option(
    tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    options = _options("--train_file", tmp_path / "a.bin", "--tokenizer_name", tiny_gpt2_dir)
    with pytest.raises(UsageError, match="leave --streaming out"), open_dataset(options, ALONE, None, Stop()):
        pytest.fail("the text was opened")


def test_held_out_when_another_node_cannot_see_the_folder_then_refused_with_the_variable(job: StreamJob) -> None:
    shutil.rmtree(job.folder.path, ignore_errors=True)
    with pytest.raises(UserError, match="HF_HOME"):
        module._held_out(job)
