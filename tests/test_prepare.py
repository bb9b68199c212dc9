"""Tests of ``python -m llm.prepare``, from the command line to the shards: killed, continued, verified."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from llm.data.shards.format import open_folder
from llm.data.shards.writer import SplitWriter
from llm.data.sources import hub_streaming as hub_streams
from llm.prepare import PrepareOptions, main

ROOT = Path(__file__).parents[1]
NUM_ROWS = 3000


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """JSON lines with 3000 documents, an empty text and a null."""
    draw = random.Random(0)
    words = [f"w{number}ä" for number in range(300)]
    path = tmp_path / "rows.jsonl"
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(NUM_ROWS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "", None]))
    return path


def _words(rows: Path, tokenizer: Path, folder: Path, *more: str) -> list[str]:
    """Return a command line of llm.prepare for one worker and small shards."""
    return [
        *("--train_file", str(rows), "--tokenizer_name", str(tokenizer), "--output_dir", str(folder)),
        *("--shard_size", "20000", "--preprocessing_num_workers", "1", *more),
    ]


def _content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files in a folder by their path, without hidden files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_prepare_when_run_then_writes_shards_that_verify_finds_good(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(_words(rows, tiny_gpt2_dir, folder)) == 0
    out = capsys.readouterr().out
    assert "MB/s" in out and "bytes a token" in out
    assert "skipped: 2 rows (empty: 1, null: 1)" in out
    streams = open_folder(folder)
    assert streams.validation is not None
    assert (streams.train.num_documents or 0) + (streams.validation.num_documents or 0) == NUM_ROWS
    assert len(streams.train.tokens) > 200_000
    assert main(["--output_dir", str(folder), "--verify"]) == 0
    assert capsys.readouterr().out.count(": good") == len(list(folder.glob("*.bin"))) + 1
    content = _content(folder)
    assert main(_words(rows, tiny_gpt2_dir, folder)) == 0
    assert "finished already" in capsys.readouterr().out
    assert _content(folder) == content


def test_prepare_when_on_a_terminal_then_prints_a_progress_bar_and_lines_above_it(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.data.preparation.chunking.BATCH_CHARS", 20_000)
    monkeypatch.setattr("llm.data.preparation.progress_bar._DELAY_SECONDS", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(_words(rows, tiny_gpt2_dir, tmp_path / "out", "--validation_split_percentage", "0")) == 0
    printed = capsys.readouterr()
    bar = printed.err.replace("\r", "\n").splitlines()
    assert any("tokenizing" in line and "B/s" in line and "M tokens" in line and "%" in line for line in bar)
    assert "\nskipped: " in printed.out and "tokenized rows.jsonl" in printed.out
    assert "tokenizing rows.jsonl" not in printed.out


def test_prepare_when_a_byte_changed_then_verify_names_the_shard(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(_words(rows, tiny_gpt2_dir, folder)) == 0
    path = folder / "train_00002.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    assert main(["--output_dir", str(folder), "--verify"]) == 1
    printed = capsys.readouterr()
    assert f"{path}: has other ids" in printed.out
    assert "1 shards are damaged" in printed.err


def test_prepare_when_the_tokenizer_changed_then_verify_fails(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(_words(rows, tiny_gpt2_dir, folder)) == 0
    path = folder / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer))
    assert main(["--output_dir", str(folder), "--verify"]) == 1
    assert "tokenizer is not the tokenizer of the shards" in capsys.readouterr().err


def test_prepare_when_interrupted_then_can_be_continued(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    words = _words(rows, tiny_gpt2_dir, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "_finish_shard", interrupted)
        assert main(words) == 130
    assert "interrupted; start the same command again" in capsys.readouterr().err
    assert main(words) == 0


def test_prepare_when_a_tokenizer_is_trained_then_it_is_saved_beside_the_shards(rows: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "out"
    words = ["--train_file", str(rows), "--train_tokenizer", "bpe", "--vocab_size", "300", "--output_dir", str(folder)]
    assert main(words) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert len(tokenizer) == 300
    first = json.loads(rows.read_text().splitlines()[0])["text"]
    assert tokenizer.decode(open_folder(folder).train.tokens[:800]).startswith(first)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocab_size", "300", "--tokenizer_name", "gpt2"], "--vocab_size applies to --train_tokenizer bpe"),
        (["--train_tokenizer", "bpe", "--tokenizer_name", "gpt2"], "give one of them"),
        ([], "no tokenizer"),
    ],
)
def test_prepare_when_options_contradict_then_exit_code_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output_dir", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prepare_when_the_folder_holds_other_shards_or_files_then_refused(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(_words(rows, tiny_gpt2_dir, folder)) == 0
    assert main(_words(rows, tiny_gpt2_dir, folder, "--shard_size", "30000")) == 1
    assert "begun with another shard_size;" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.bin").write_bytes(b"12")
    assert main(_words(rows, tiny_gpt2_dir, tmp_path / "other")) == 1
    assert "holds train.bin" in capsys.readouterr().err


def test_prepare_when_the_text_is_a_hub_dataset_then_streams_it_and_holds_out_by_hash(
    tiny_gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(400)]}).to_iterable_dataset()
    monkeypatch.setattr(hub_streams, "load_streaming_dataset", lambda *_: ({"train": table}, "commit"))
    monkeypatch.setattr("llm.hub.connection.hub_is_reachable", lambda: True)
    words = ["--dataset_name", "some/set", "--tokenizer_name", str(tiny_gpt2_dir), "--shard_size", "500"]
    assert main([*words, "--validation_split_percentage", "20", "--output_dir", str(tmp_path / "a")]) == 0
    streams = open_folder(tmp_path / "a")
    assert streams.validation is not None and streams.validation.num_documents is not None
    assert 50 < streams.validation.num_documents < 110
    assert (streams.train.num_documents or 0) + streams.validation.num_documents == 400


def test_prepare_when_a_stream_breaks_then_one_line_and_the_next_start_continues(
    tiny_gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [{"text": f"document {i} " * 20} for i in range(200)]
    monkeypatch.setattr("llm.data.preparation.chunking.BATCH_CHARS", 4000)
    monkeypatch.setattr("llm.hub.connection.hub_is_reachable", lambda: True)

    def prepare(folder: Path, length: int) -> int:
        class Table:
            def __iter__(self):  # type: ignore[no-untyped-def]
                yield from texts[:length]
                if length < len(texts):
                    raise ConnectionError("the line is dead")

        monkeypatch.setattr(hub_streams, "load_streaming_dataset", lambda *_: ({"train": Table()}, "commit"))
        words = ["--dataset_name", "some/set", "--tokenizer_name", str(tiny_gpt2_dir), "--shard_size", "1000"]
        return main([*words, "--output_dir", str(folder)])

    assert prepare(tmp_path / "broken", 120) == 1
    assert "the download stopped (the line is dead); start the same command again" in capsys.readouterr().err
    assert len(list((tmp_path / "broken").glob("train_*.json"))) > 10
    assert prepare(tmp_path / "broken", 200) == 0
    assert "continuing after" in capsys.readouterr().out
    assert prepare(tmp_path / "uninterrupted", 200) == 0
    assert _content(tmp_path / "broken") == _content(tmp_path / "uninterrupted")


# Prints "ready" at the first text. The time of a kill counts from there: a kill during the imports would test nothing.
SLOW_ENCODER = """
import sys, time
from llm.data.preparation import chunking
from llm.tokenization.encoder import Encoder
from llm import prepare
encode = Encoder.encode
printed = []
chunking.BATCH_CHARS = 30_000
def slow(self, texts):
    if not printed:
        printed.append(sys.stderr.write("ready\\n"))
        sys.stderr.flush()
    time.sleep(0.04)
    return encode(self, texts)
Encoder.encode = slow
sys.exit(prepare.main(sys.argv[1:]))
"""

# The same with worker processes, here for texts of any length; "ready" is followed by their process ids.
SLOW_WORKERS = """
import sys, time
from llm.data.preparation import chunking
from llm.tokenization import encoder as encoding
from llm.tokenization.encoder import Encoder
from llm import prepare
submit = Encoder._submit
printed = []
chunking.BATCH_CHARS = 30_000
encoding._MIN_CHARS_FOR_TIKTOKEN = 0
def slow(self, texts):
    waiting = submit(self, texts)
    if not printed:
        printed.append(print("ready", *(worker._process.pid for worker in self._workers._workers), file=sys.stderr))
        sys.stderr.flush()
    time.sleep(0.04)
    return waiting
Encoder._submit = slow
sys.exit(prepare.main(sys.argv[1:]))
"""


def _start(words: list[str], program: str = SLOW_ENCODER) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _kill_and_compare(rows: Path, tokenizer: Path, tmp_path: Path, num_kills: int, program: str, *more: str) -> None:
    """Kill prepare at random times, three times per folder, then finish each folder and compare its bytes."""
    assert main(_words(rows, tokenizer, tmp_path / "uninterrupted")) == 0
    expected = _content(tmp_path / "uninterrupted")
    draw = random.Random(num_kills)
    killed = 0
    attempt = 0
    shard_counts = set()
    workers: list[int] = []
    while killed < num_kills:
        folder = tmp_path / f"killed_{attempt}"
        attempt += 1
        for number in range(3):
            num_files = len(list(folder.glob("*.json")))
            process = _start(_words(rows, tokenizer, folder, *more), program)
            assert process.stderr is not None
            workers += map(int, process.stderr.readline().split()[1:])
            while number == 1 and process.poll() is None and len(list(folder.glob("*.json"))) <= num_files:
                time.sleep(0.01)  # one in three is killed after a new shard, even on a slow machine
            time.sleep(draw.uniform(0.0, 1.0))
            process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                killed += 1
            shard_counts.add(len(list(folder.glob("*.json"))))
        assert main(_words(rows, tokenizer, folder)) == 0
        assert _content(folder) == expected
        assert not [*folder.glob(".*.tmp"), *folder.glob(".*.old")]
        assert np.array_equal(
            open_folder(folder).train.tokens[:], open_folder(tmp_path / "uninterrupted").train.tokens[:]
        )
    assert len(shard_counts) > 1  # not all kills were before the first shard or after the last
    time.sleep(1.0)
    assert len(workers) >= (2 * num_kills if program == SLOW_WORKERS else 0)
    assert not [pid for pid in workers if _is_worker(pid)]


def _is_worker(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], stdout=subprocess.PIPE, text=True, check=False)
    return "llm.system.subprocesses" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_prepare_when_killed_at_random_times_then_continues_to_the_same_bytes(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    _kill_and_compare(rows, tiny_gpt2_dir, tmp_path, 3, SLOW_ENCODER)


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_prepare_when_killed_with_two_workers_then_they_exit_and_the_bytes_are_the_same(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    _kill_and_compare(rows, tiny_gpt2_dir, tmp_path, 3, SLOW_WORKERS, "--preprocessing_num_workers", "2")


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_prepare_when_killed_fifty_times_then_continues_to_the_same_bytes(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path, num_workers: int
) -> None:
    program = SLOW_ENCODER if num_workers == 1 else SLOW_WORKERS
    more = ("--preprocessing_num_workers", str(num_workers))
    _kill_and_compare(rows, tiny_gpt2_dir, tmp_path, 50, program, *more)


def test_prepare_when_killed_while_saving_the_tokenizer_then_temporary_files_are_removed(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    assert main(_words(rows, tiny_gpt2_dir, folder)) == 0
    expected = _content(folder)
    (folder / "manifest.json").unlink()
    (folder / "tokenizer").rename(folder / ".tokenizer.123.tmp")
    (folder / ".manifest.json.123.tmp").write_text("{")
    (folder / ".train_00001.bin.0123abcd.tmp").write_bytes(b"half")
    (folder / ".validation_00000.starts.123.tmp").write_bytes(b"half")
    assert main(_words(rows, tiny_gpt2_dir, folder)) == 0
    assert _content(folder) == expected
    assert not list(folder.glob(".*.tmp"))


def test_prepare_when_another_process_takes_the_folder_then_stops_with_one_line(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.data.preparation.chunking.BATCH_CHARS", 20_000)
    folder = tmp_path / "out"
    finish = SplitWriter._finish_shard
    finished: list[SplitWriter] = []

    def finish_and_lose_the_lock(writer: SplitWriter) -> None:
        finish(writer)
        finished.append(writer)
        if len(finished) == 3:
            (folder / ".lock").write_text('{"host": "another-host", "pid": 7}')

    monkeypatch.setattr(SplitWriter, "_finish_shard", finish_and_lose_the_lock)
    assert main(_words(rows, tiny_gpt2_dir, folder)) == 1
    printed = capsys.readouterr().err
    assert "is held by another run now (process 7 on another-host)" in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert len(finished) == len(list(folder.glob("*.bin"))) == 3
    assert not list(folder.glob(".*.tmp"))
    assert json.loads((folder / ".lock").read_text())["pid"] == 7


def test_prepare_when_no_shard_was_written_then_accepts_another_text(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    words = ["--tokenizer_name", str(tiny_gpt2_dir), "--output_dir", str(tmp_path / "out"), "--train_file"]
    assert main([*words, str(tmp_path / "empty.txt")]) == 1
    assert main([*words, str(rows)]) == 0
    capsys.readouterr()
    assert main([*words, str(tmp_path / "empty.txt")]) == 1
    assert "begun with another text and another content of the text" in capsys.readouterr().err


def test_prepare_when_the_tokenizer_cannot_be_written_then_one_line(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    words = ["--tokenizer_name", str(tiny_gpt2_dir), "--output_dir", str(tmp_path / "out"), "--train_file", str(rows)]
    assert main(words) == 1
    assert "cannot be written (No space left on device (os error 28)); make room" in capsys.readouterr().err


def test_prepare_when_the_folder_holds_other_hidden_files_then_keeps_them(
    rows: Path, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc.old").write_text("mine")
    (home / ".tokenizer.77.tmp").mkdir()
    words = ["--tokenizer_name", str(tiny_gpt2_dir), "--output_dir", str(home), "--train_file", str(rows)]
    assert main(words) == main(words) == 0
    assert (home / ".bashrc.old").read_text() == "mine"
    assert not (home / ".tokenizer.77.tmp").exists()


def test_prepare_options_when_read_then_give_the_options_of_the_trainer() -> None:
    options = PrepareOptions(output_dir="x", train_file=("a.txt",), train_tokenizer="bpe", vocab_size=300)
    assert options.data.train_file == ("a.txt",)
    assert options.tokenizer.tokenizer_name == "train:bpe"
    assert options.tokenizer.vocab_size == 300


RECIPES = sorted((ROOT / "examples" / "data").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_when_run_with_stand_ins_then_writes_shards(
    recipe: Path, rows: Path, tiny_gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = recipe.read_text().splitlines()[0]
    assert first.startswith("# ") and ("second" in first or "time" in first)
    table = datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(300)]}).to_iterable_dataset()
    monkeypatch.setattr(
        hub_streams, "load_streaming_dataset", lambda *_: ({"train": table, "validation": table}, "commit")
    )
    monkeypatch.setattr("llm.hub.connection.hub_is_reachable", lambda: True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_folder").mkdir()
    (tmp_path / "my_folder" / "a.txt").write_text("some text\n" * 50)
    (tmp_path / "shakespeare.txt").write_text("some text\n" * 50)
    tokenizer = [] if "train_tokenizer" in recipe.read_text() else ["--tokenizer_name", str(tiny_gpt2_dir)]
    assert main(["--config", str(recipe), *tokenizer]) == 0
    assert len(open_folder(tmp_path / "data" / recipe.stem).train.tokens) > 50


def test_recipes_when_listed_then_all_exist() -> None:
    names = {"fineweb_edu_10bt", "my_folder", "openwebtext", "tinyshakespeare", "wikitext"}
    assert {path.stem for path in RECIPES} == names
