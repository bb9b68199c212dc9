"""The process that writes a stream's shards: paced, killed, continued, and ended with its parent."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from llm.config.errors import UserError
from llm.config.options import DataOptions
from llm.data.streaming.source import TextStream
from llm.data.streaming.writer_process import StreamJob, StreamWriter

ROOT = Path(__file__).parents[2]
SHARD = 100_000
EVERYTHING = 1 << 20


def job(tokenizer, folder: Path, *files: Path, **options: object) -> StreamJob:  # type: ignore[no-untyped-def]
    text = TextStream(DataOptions(train_file=tuple(map(str, files)), **options), None, head_bytes=1 << 20)
    return StreamJob(text, tokenizer, "bytes", True, folder, SHARD, num_workers=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of about 9 MB, so that the writer reads the request file a few times."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": draw.randbytes(1500).hex()}) + "\n" for _ in range(3000)))
    return path


@pytest.fixture(scope="module")
def expected(rows: Path, byte_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:  # type: ignore[no-untyped-def]
    """The files of the stream, as one uninterrupted writer leaves them."""
    stream_job = job(byte_tokenizer, tmp_path_factory.mktemp("expected"), rows)
    stream_job.folder.path.mkdir()
    stream_job.folder.request(EVERYTHING)
    stream_job.write(check=lambda: None)
    return content(stream_job)


def content(stream_job: StreamJob) -> dict[str, bytes]:
    return {
        str(path.relative_to(stream_job.folder.path)): path.read_bytes()
        for path in sorted(stream_job.folder.path.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.name != "wanted"
    }


def num_shards(stream_job: StreamJob) -> int:
    return len(list(stream_job.folder.train.glob("train_*.json")))


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def start_writer(stream_job: StreamJob, num_shards_requested: int) -> StreamWriter:
    stream_job.folder.path.mkdir(parents=True, exist_ok=True)
    stream_job.folder.request(num_shards_requested)
    return StreamWriter(stream_job)


def processes() -> set[str]:
    """Return the running writers of this process; other tests may run at the same time."""
    listed = subprocess.run(["ps", "-wweo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True).stdout
    mine = [line for line in listed.splitlines() if line.split()[1] == str(os.getpid())]
    return {line for line in mine if "llm.system.subprocesses" in line and " Z" not in line}


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    before = processes()
    yield
    until(lambda: processes() <= before, 10)


@pytest.mark.slow
def test_writer_when_shards_are_requested_then_pauses_after_them_and_continues_on_request(
    rows: Path, expected: dict[str, bytes], byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    stream_job = job(byte_tokenizer, tmp_path, rows)
    with closing(start_writer(stream_job, 3)) as writer:
        until(lambda: num_shards(stream_job) >= 3)
        assert stream_job.folder.has_split
        held_out = stream_job.folder.held_out()
        assert held_out is not None
        assert held_out.num_bytes == 17 * 3000  # 5 % of the first megabyte, in documents of 3,000 bytes
        time.sleep(2)
        paused = num_shards(stream_job)
        # What is encoded at once, and what lies between two looks, comes in any case.
        assert 3 <= paused <= 3 + (5 << 20) // SHARD + 2
        writer.check()
        stream_job.folder.request(EVERYTHING)
        until(lambda: (stream_job.folder.train / "manifest.json").exists())
        until(lambda: not stream_job.folder.lock.exists())
        writer.check()
    assert content(stream_job) == expected
    assert num_shards(stream_job) > paused


@pytest.mark.slow
def test_writer_when_killed_at_any_time_then_the_next_one_writes_the_same_bytes(
    rows: Path, expected: dict[str, bytes], byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    stream_job = job(byte_tokenizer, tmp_path, rows)
    for number, kill in ((0, signal.SIGKILL), (7, signal.SIGKILL), (12, signal.SIGTERM)):
        with closing(start_writer(stream_job, EVERYTHING)) as writer:
            until(lambda number=number: number == 0 or num_shards(stream_job) >= number)
            time.sleep(0.05)
            os.kill(writer._process.pid, kill)
            until(lambda writer=writer: writer._process.exit_code is not None)
            if kill == signal.SIGKILL:
                writer.check()  # perhaps this process is being killed too
                time.sleep(2.1)
                with pytest.raises(UserError, match=r"was killed \(exit code -9\); start again: it continues"):
                    writer.check()
    with closing(start_writer(stream_job, EVERYTHING)):
        until(lambda: (stream_job.folder.train / "manifest.json").exists())
    assert content(stream_job) == expected


@pytest.mark.slow
def test_writer_when_another_one_writes_then_waits_and_takes_over(
    rows: Path, expected: dict[str, bytes], byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    stream_job = job(byte_tokenizer, tmp_path, rows)
    with closing(start_writer(stream_job, 1)) as first:
        until(lambda: num_shards(stream_job) >= 1)
        with closing(start_writer(stream_job, EVERYTHING)) as second:
            # What the second one's run wants, the first one writes.
            until(lambda: (stream_job.folder.train / "manifest.json").exists())
            first.check()
            second.check()
    assert content(stream_job) == expected
    os.remove(stream_job.folder.train / "manifest.json")
    os.remove(stream_job.folder.train / "train_00040.json")
    with closing(start_writer(stream_job, 1)) as first:
        until(lambda: stream_job.folder.lock.exists())
        os.kill(first._process.pid, signal.SIGSTOP)
        with closing(start_writer(stream_job, EVERYTHING)) as second:
            time.sleep(4)
            second.check()
            assert not (stream_job.folder.train / "manifest.json").exists()
            os.kill(first._process.pid, signal.SIGKILL)
            # A killed process keeps its process number until its parent reads the exit code.
            until(lambda: first._process.exit_code is not None)
            until(lambda: (stream_job.folder.train / "manifest.json").exists())
            second.check()
    assert content(stream_job) == expected


def error_of(stream_job: StreamJob) -> str:
    """Return the message of the error with which a writer fails within seconds."""
    with closing(start_writer(stream_job, EVERYTHING)) as writer:
        until(lambda: writer._process.exit_code is not None, 30)
        with pytest.raises(UserError) as failure:
            writer.check()
        with pytest.raises(UserError, match=re.escape(str(failure.value))):  # and again
            writer.check()
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_writer_when_the_text_is_broken_then_one_line(rows: Path, byte_tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    broken = tmp_path / "broken.jsonl"
    broken.write_text(('{"text": "' + "a" * 1000 + '"}\n') * 9000 + '{"text": oh\n')
    stream_job = job(byte_tokenizer, tmp_path, broken)
    assert "broken.jsonl" in error_of(stream_job)
    assert num_shards(stream_job) >= 1  # of what came before
    assert not stream_job.folder.lock.exists()


def test_writer_when_the_folder_cannot_be_written_then_one_line(rows: Path, byte_tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stream_job = job(byte_tokenizer, tmp_path, rows, validation_split_percentage=0)
    stream_job.folder.path.mkdir()
    stream_job.folder.train.write_text("in the way")
    assert "cannot be written (File exists); make room, or set HF_HOME" in error_of(stream_job)


# No guard around what it does: the writer must not import it. A forked process, such as a loader's, outlives it.
PARENT = """
import os, sys, time, pickle
from pathlib import Path
from llm.data.streaming.writer_process import StreamWriter
job = pickle.loads(Path(sys.argv[1]).read_bytes())
writer = StreamWriter(job)
print(writer._process.pid, flush=True)
if "fork" in sys.argv and not os.fork():
    os.close(1)
    time.sleep(15)
    os._exit(0)
if "wait" in sys.argv:
    writer.folder.request(1 << 20)
    while not (writer.folder.train / "manifest.json").exists():
        writer.check()
        time.sleep(0.05)
    writer.check()
    writer.close()
    writer.close()
else:
    time.sleep(99)
"""


def start(stream_job: StreamJob, tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    """Start a script that starts a writer, prints its process number, and waits."""
    stream_job.folder.path.mkdir(exist_ok=True)
    stream_job.folder.request(1)
    (tmp_path / "job").write_bytes(pickle.dumps(stream_job))
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "job"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_writer_when_started_by_a_script_without_guard_then_the_script_runs_once_and_all_is_written(
    rows: Path, expected: dict[str, bytes], byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    stream_job = job(byte_tokenizer, tmp_path, rows)
    with start(stream_job, tmp_path, "wait") as parent:
        printed, _ = parent.communicate(timeout=90)
    assert parent.returncode == 0
    assert len(printed.splitlines()) == 1
    assert content(stream_job) == expected
    assert not stream_job.folder.lock.exists()


@pytest.mark.parametrize("words", [(), ("fork",)])
def test_writer_when_its_parent_is_killed_then_it_exits_and_removes_its_lock(
    rows: Path, byte_tokenizer, tmp_path: Path, words: tuple[str, ...]
) -> None:  # type: ignore[no-untyped-def]
    stream_job = job(byte_tokenizer, tmp_path, rows)
    with start(stream_job, tmp_path, *words) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        until(lambda: num_shards(stream_job) >= 1)
        assert stream_job.folder.lock.exists()
        for number in (signal.SIGINT, signal.SIGUSR1):  # which reach all processes, and are not for the writer
            os.kill(pid, number)
        time.sleep(0.2)
        os.kill(pid, 0)
        parent.kill()
    until(lambda: not Path(f"/proc/{pid}").exists(), 5)
    assert not stream_job.folder.lock.exists()


def test_writer_when_closed_before_it_has_begun_then_it_exits_at_once(
    rows: Path, byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    stream_job = job(byte_tokenizer, tmp_path, rows)
    writer = start_writer(stream_job, 1)
    started = time.monotonic()
    writer.close()
    assert time.monotonic() - started < 2
    assert not stream_job.folder.lock.exists()


def test_writer_when_the_tokenizer_cannot_be_unpickled_then_one_line(
    rows: Path, byte_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    import __main__

    class Named(type(byte_tokenizer)):  # type: ignore[misc]
        """A tokenizer class as if it were defined in a notebook."""

    Named.__module__ = "__main__"
    Named.__qualname__ = "Named"
    monkeypatch.setattr(__main__, "Named", Named, raising=False)
    tokenizer = Named(tokenizer_object=byte_tokenizer.backend_tokenizer)
    assert "the stream cannot be written: AttributeError: " in error_of(job(tokenizer, tmp_path, rows))


@pytest.mark.slow
def test_writer_when_its_lock_is_taken_over_then_it_stops_writing_and_waits(
    rows: Path, expected: dict[str, bytes], byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    stream_job = job(byte_tokenizer, tmp_path, rows)
    with closing(start_writer(stream_job, 2)) as writer:
        until(lambda: num_shards(stream_job) >= 2)
        other = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": None, "id": "another"})
        stream_job.folder.lock.write_text(other)
        time.sleep(1)
        before = content(stream_job)
        stream_job.folder.request(EVERYTHING)
        time.sleep(3)
        writer.check()
        assert content(stream_job) == before
        assert not list(stream_job.folder.train.glob(".*.tmp"))  # the writer has removed its temporary files
        assert stream_job.folder.lock.read_text() == other
        (stream_job.folder.train / f".train_{len(before):05}.bin.dead.tmp").write_bytes(b"of a killed process")
        stream_job.folder.lock.unlink()
        until(lambda: (stream_job.folder.train / "manifest.json").exists())
        until(lambda: not stream_job.folder.lock.exists())
    assert content(stream_job) == expected
    assert sorted(path.name for path in stream_job.folder.path.rglob(".*")) == []
