"""The main program with --streaming: a text that arrives while it trains."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

import llm.data.streaming.dataset
from tests.conftest import Outcome, keep_only
from tests.hub_server import REVISION, StandInHub, stand_in_hub
from tests.trainers.test_mistakes import one_line, replaced

Train = Callable[..., Outcome]
ROOT = Path(__file__).parents[2]
SHARD = 4000

# The trainer with small shards, in a process of its own; without a guard, and run once. The writer's process imports
# the module of what it is to do, which makes batches small there.
PROGRAM = f"""
import sys
import llm.data.streaming.writer_process
import llm.data.streaming.dataset
import small
from llm.trainers.gpt import main
print("the program runs", flush=True)
llm.data.streaming.writer_process.write_stream = small.write_stream
llm.data.streaming.dataset.SHARD_SIZE = {SHARD}
sys.exit(main())
"""
SMALL = """
import llm.data.preparation.chunking
from llm.data.streaming import writer_process as stream_writer
llm.data.preparation.chunking.BATCH_CHARS = 2000
original = stream_writer.write_stream
def write_stream(pipe, job):
    original(pipe, job)
"""


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llm.data.streaming.dataset, "SHARD_SIZE", SHARD)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))


@pytest.fixture(autouse=True)
def _no_process_stays(tmp_path: Path) -> Iterator[None]:
    yield
    until(lambda: not writers(tmp_path), 10)


def writers(folder: Path) -> set[str]:
    """Return the running writers of a test with this folder; other tests may run at the same time."""
    listed = subprocess.run(["ps", "-wweo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True).stdout
    pids = set()
    for line in listed.splitlines():
        if "llm.system.subprocesses" in line and " Z" not in line:
            pid, parent = line.split()[:2]
            if parent == str(os.getpid()) or str(folder).encode() in _environment(pid):
                pids.add(pid)
    return pids


def _environment(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def until(condition: Callable[[], object], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in KEPT} for line in lines]


# The head of the stream, which is read first, is longer than the whole text of these tests.
NOTHING_HELD_OUT = ("--validation_split_percentage", "0")
KEPT = ("step", "loss", "lr", "grad_norm", "tokens", "epoch", "eval_loss", "bits_per_byte")


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "all_results.json").read_text())
    return content


def are_equal(one: Path, other: Path) -> bool:
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture
def options(tiny_gpt2_dir: Path) -> list[str]:
    """Options of a run of 250 steps of 8 blocks of 32 tokens, a little more than the 60 kB of `tiny_text`."""
    return [
        *("--streaming", "--tokenizer_name", str(tiny_gpt2_dir), "--config_name", str(tiny_gpt2_dir)),
        *("--dropout", "0", "--block_size", "32", "--per_device_train_batch_size", "8", "--max_train_steps", "250"),
        *("--learning_rate", "1e-3", "--seed", "7", "--use_cpu", "--mixed_precision", "no"),
        *("--logging_steps", "25", "--eval_steps", "125"),
    ]


@pytest.mark.slow
def test_streaming_when_trained_then_every_token_is_counted_and_a_second_run_and_a_resume_are_equal(
    train: Train, options: list[str], tiny_text: Path, tmp_path: Path
) -> None:
    options = ["--train_file", str(tiny_text), *options, "--checkpointing_steps", "100"]
    outcome = train(*options, "--output_dir", tmp_path / "whole")
    assert outcome.code == 0, outcome.err
    size = tiny_text.stat().st_size
    run_results = results(tmp_path / "whole")
    assert sum(run_results["ledger"].values()) == size + 1
    held_out = run_results["ledger"]["validation_tokens"] + run_results["ledger"]["dropped_validation"]
    assert held_out == int(size * 0.05)  # one document is cut inside; its end-of-text token is not here
    assert run_results["num_unreached_tokens"] == 0
    assert run_results["num_eval_tokens"] == run_results["ledger"]["validation_tokens"] - 1
    lines = outcome.out.splitlines()
    assert f"tokens: {run_results['ledger']['validation_tokens']:,} held out" in outcome.out
    assert "the rest as it arrives, shuffled within windows of 124 blocks" in outcome.out
    num_blocks = (run_results["ledger"]["train_tokens"] - 1) // 32
    assert f"the stream ended after {num_blocks:,} blocks: epoch 2 begins, shuffled as a whole" in lines
    assert f"tokens that arrived: {num_blocks * 32 + 1:,} trained on + 0 not reached" in outcome.out
    assert not any("epoch" in record for record in records(tmp_path / "whole"))

    again = train(*options, "--dataloader_num_workers", "2", "--output_dir", tmp_path / "again")
    assert again.code == 0, again.err
    assert are_equal(tmp_path / "whole", tmp_path / "again")
    assert records(tmp_path / "whole") == records(tmp_path / "again")

    keep_only(tmp_path / "again", 100)
    shutil.rmtree(tmp_path / "hf")  # the shards are made again
    resumed = train(*options, "--output_dir", tmp_path / "again", "--resume_from_checkpoint")
    assert resumed.code == 0, resumed.err
    assert "resumed from step 100" in resumed.out
    assert are_equal(tmp_path / "whole", tmp_path / "again")
    assert records(tmp_path / "whole") == records(tmp_path / "again")


def test_streaming_when_the_run_is_shorter_than_the_stream_then_unreached_tokens_are_reported(
    train: Train, options: list[str], tiny_text: Path, tmp_path: Path
) -> None:
    words = replaced(options, "--max_train_steps", "3")
    outcome = train("--train_file", tiny_text, *words, "--output_dir", tmp_path / "run", "--overwrite_cache")
    assert outcome.code == 0, outcome.err
    run_results = results(tmp_path / "run")
    blocks = (run_results["ledger"]["train_tokens"] - 1) // 32
    assert run_results["num_unreached_tokens"] == (blocks - 3 * 8) * 32
    assert f"{3 * 8 * 32 + 1} trained on + {run_results['num_unreached_tokens']:,} not reached" in outcome.out


@pytest.mark.parametrize("held_out", ["0", "5"])
def test_dry_run_when_streaming_then_the_plan_is_logged_and_no_process_is_left(
    train: Train, options: list[str], tiny_text: Path, held_out: str
) -> None:
    words = [*options, "--validation_split_percentage", held_out, "--dry_run"]
    outcome = train("--train_file", tiny_text, *words)
    assert outcome.code == 0, outcome.err
    assert "updates: 250 of 8 blocks of 32 tokens, of a stream; seed 7" in outcome.out
    assert ("held out for validation: nothing" in outcome.out) == (held_out == "0")


def test_streaming_when_combined_with_contradicting_options_then_refused(
    train: Train, options: list[str], tiny_text: Path, tmp_path: Path
) -> None:
    at = options.index("--max_train_steps")
    (tmp_path / "ids.bin").write_bytes(bytes(4000))
    file = ["--train_file", str(tiny_text)]
    for words, message in (
        ([*file, *options[:at], *options[at + 2 :]], "give --max_train_steps"),
        (["--train_dir", str(tmp_path), *options], "leave --streaming out"),
        (["--train_file", str(tmp_path / "ids.bin"), *options], "leave --streaming out"),
        ([*file, *replaced(options, "--tokenizer_name", "char")], "use train:bpe"),
        ([*file, *options, "--checkpointing_steps", "epoch"], "give a number of steps"),
    ):
        assert message in one_line(train(*words), 2)


def test_streaming_when_the_text_is_shorter_than_a_block_then_refused(
    train: Train, options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("too short")
    line = one_line(train("--train_file", tmp_path / "a.txt", *options), 1)
    assert "--block_size 32 needs 33" in line


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    """Serves a dataset of two files; the second one may arrive late, or damaged."""
    rows = [json.dumps({"text": f"document {number} of words and more words", "n": number}) for number in range(4000)]
    with stand_in_hub() as server:
        server.datasets["someone/words"] = {
            f"train-0000{number}.jsonl": "\n".join(rows[number * 2000 : (number + 1) * 2000]).encode()
            for number in range(2)
        }
        yield server


@pytest.fixture
def run(hub: StandInHub, options: list[str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the trainer on the dataset of the Hub: `run(*words, num_ranks=1) -> process`."""
    begun: list[subprocess.Popen[str]] = []

    def run(*words: str | Path, num_ranks: int = 1) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        places = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
        (tmp_path / "program.py").write_text(PROGRAM)
        (tmp_path / "small.py").write_text(SMALL)
        command = [sys.executable, str(tmp_path / "program.py")]
        if num_ranks > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
            command = [*launcher, "--nproc_per_node", str(num_ranks), *command]
        command += ["--dataset_name", "someone/words", *map(str, [*options, *words])]
        log = (tmp_path / "err.txt").open("w")
        process = subprocess.Popen(
            command,
            env={**kept, **places, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        begun.append(process)
        return process

    yield run
    for process in begun:
        if process.poll() is None:
            process.kill()
            process.wait()


def done(process: subprocess.Popen[str], tmp_path: Path) -> tuple[int, str, str]:
    out, _ = process.communicate(timeout=120)
    return process.returncode, out, (tmp_path / "err.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_streaming_when_the_hub_is_unreachable_later_then_resumed_from_the_shards(
    run: Callable[..., subprocess.Popen[str]], hub: StandInHub, tmp_path: Path
) -> None:
    words = ["--checkpointing_steps", "100"]
    code, out, err = done(run(*words, "--output_dir", tmp_path / "whole"), tmp_path)
    assert code == 0, err
    assert err == ""
    assert out.count("the program runs") == 1
    assert f"stream: someone/words at {REVISION[:12]}, shards in" in out
    assert "held out for validation: the head of the stream" in out
    assert results(tmp_path / "whole")["revision"] == f"someone/words@{REVISION}"
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    keep_only(tmp_path / "cut", 100)
    for name in ("someone/words", "HEAD /"):
        hub.fail[name] = 503
    code, out, err = done(run(*words, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint"), tmp_path)
    assert code == 0, err
    assert "resumed from step 100" in out
    assert are_equal(tmp_path / "whole", tmp_path / "cut")
    # A fresh start cannot know which commit is the newest.
    code, out, err = done(run("--output_dir", tmp_path / "fresh"), tmp_path)
    assert code == 1
    assert re.fullmatch(r"error: --dataset_name someone/words: cannot be loaded .*\n", err)
    # Nor can shards that are not there be made; the one line comes at once.
    shutil.rmtree(tmp_path / "hf" / "llm" / "tokens")
    code, out, err = done(run(*words, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint"), tmp_path)
    assert code == 1
    assert err.count("error: ") == 1
    assert "someone/words" in err


@pytest.mark.slow
def test_streaming_when_on_two_ranks_then_equal_to_one_rank(
    run: Callable[..., subprocess.Popen[str]], train: Train, tmp_path: Path
) -> None:
    words = ["--adam_epsilon", "1e-6", "--global_batch_size", "8", "--max_train_steps", "200"]
    code, _, err = done(run(*words, "--output_dir", tmp_path / "one"), tmp_path)
    assert code == 0, err
    shutil.rmtree(tmp_path / "hf")
    words += ["--per_device_train_batch_size", "4", "--dataloader_num_workers", "1"]
    code, out, err = done(run(*words, "--output_dir", tmp_path / "two", num_ranks=2), tmp_path)
    assert code == 0, err
    assert "2 processes" in out
    one, two = load_file(tmp_path / "one" / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5


def reach(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError("the run ended before")


def status(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return content


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_streaming_when_a_signal_comes_while_waiting_then_saves_and_stops_at_once(
    run: Callable[..., subprocess.Popen[str]], hub: StandInHub, tmp_path: Path, num_ranks: int
) -> None:
    hub.hold = "train-00001"
    words = [*NOTHING_HELD_OUT, "--logging_steps", "1", "--max_train_steps", "900", "--dataloader_num_workers", "1"]
    words += ["--per_device_train_batch_size", str(8 // num_ranks), "--output_dir", str(tmp_path / "run")]
    process = run(*words, num_ranks=num_ranks)
    reach(process, "step 1/")
    last = [0]

    def is_waiting() -> bool:
        time.sleep(2)
        newest = (tmp_path / "run" / "metrics.jsonl").read_text().count('"lr"')
        stands, last[0] = newest == last[0], newest
        return stands

    until(is_waiting)
    started = time.monotonic()
    if num_ranks == 1:
        process.send_signal(signal.SIGTERM)
    else:  # the second rank alone: the others hear of it
        listed = subprocess.run(["ps", "-wweo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        ranks = [int(line.split()[0]) for line in listed.splitlines() if line.split()[1] == str(process.pid)]
        (second,) = [pid for pid in ranks if b"LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(second, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    run_status = status(tmp_path / "run")
    assert (run_status["state"], run_status["exit_code"]) == ("stopped", 75), (tmp_path / "err.txt").read_text()
    assert f"saved step {run_status['step']}" in out
    assert (tmp_path / "run" / "checkpoints" / f"step_{run_status['step']}" / "manifest.json").exists()
    assert time.monotonic() - started < 20
    assert num_ranks > 1 or process.returncode == 75


@pytest.mark.slow
def test_streaming_when_the_stream_fails_then_one_line_and_a_checkpoint_is_saved(
    run: Callable[..., subprocess.Popen[str]], hub: StandInHub, tmp_path: Path
) -> None:
    good = hub.datasets["someone/words"]["train-00001.jsonl"]
    hub.datasets["someone/words"]["train-00001.jsonl"] = good[: len(good) // 2] + b"\noh no\n"
    words = ["--max_train_steps", "900", *NOTHING_HELD_OUT, "--output_dir", tmp_path / "run"]
    code, out, err = done(run(*words), tmp_path)
    assert code == 1
    assert re.fullmatch(r"error: dataset someone/words: the download stopped \(.*\); start .* resumes\n", err)
    run_status = status(tmp_path / "run")
    assert run_status["state"] == "failed"
    (saved,) = re.findall(r"^saved step (\d+)$", out, re.MULTILINE)
    assert int(saved) > 10
    hub.datasets["someone/words"]["train-00001.jsonl"] = good
    words[1] = str(int(saved) + 50)
    code, out, err = done(run(*words, "--resume_from_checkpoint"), tmp_path)
    assert code == 0, err
    assert f"resumed from step {saved}" in out


@pytest.mark.slow
def test_streaming_when_the_trainer_is_killed_then_no_process_is_left(
    run: Callable[..., subprocess.Popen[str]], hub: StandInHub, tmp_path: Path
) -> None:
    hub.hold = "train-00001"
    process = run(
        *NOTHING_HELD_OUT, "--max_train_steps", "900", "--logging_steps", "1", "--dataloader_num_workers", "2"
    )
    reach(process, "step 1/")
    time.sleep(3)  # until all wait
    assert len(writers(tmp_path)) == 1
    group = subprocess.run(["ps", "-wweo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    children = [line.split()[0] for line in group.splitlines() if line.split()[1] == str(process.pid)]
    assert len(children) >= 3  # the writer and two workers
    process.kill()
    process.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 15)
    assert process.stdout is not None
    process.stdout.close()
    assert not list((tmp_path / "hf" / "llm" / "tokens").glob("*/.lock"))
