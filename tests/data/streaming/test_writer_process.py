"""The process that writes a stream's shards: paced, killed, continued, and gone with its parent."""

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
    """Text of about 9 MB, so that the reader looks at what is wanted a few times."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": draw.randbytes(1500).hex()}) + "\n" for _ in range(3000)))
    return path


@pytest.fixture(scope="module")
def expected(rows: Path, byte_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:  # type: ignore[no-untyped-def]
    """Every file of the stream, as one uninterrupted attempt leaves it."""
    made = job(byte_tokenizer, tmp_path_factory.mktemp("expected"), rows)
    made.folder.path.mkdir()
    made.folder.request(EVERYTHING)
    made.write(check=lambda: None)
    return content(made)


def content(made: StreamJob) -> dict[str, bytes]:
    return {
        str(path.relative_to(made.folder.path)): path.read_bytes()
        for path in sorted(made.folder.path.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.name != "wanted"
    }


def num_shards(made: StreamJob) -> int:
    return len(list(made.folder.train.glob("train_*.json")))


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def begun(made: StreamJob, wanted: int) -> StreamWriter:
    made.folder.path.mkdir(parents=True, exist_ok=True)
    made.folder.request(wanted)
    return StreamWriter(made)


def processes() -> set[str]:
    """The writers of this process that live; other tests may run beside these."""
    listed = subprocess.run(["ps", "-wweo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True).stdout
    mine = [line for line in listed.splitlines() if line.split()[1] == str(os.getpid())]
    return {line for line in mine if "llm.system.subprocesses" in line and " Z" not in line}


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    before = processes()
    yield
    until(lambda: processes() <= before, 10)


@pytest.mark.slow
def test_writer_when_shards_are_wanted_then_writes_so_many_and_goes_on_when_more_are(
    rows: Path, expected: dict[str, bytes], byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    made = job(byte_tokenizer, tmp_path, rows)
    with closing(begun(made, 3)) as writer:
        until(lambda: num_shards(made) >= 3)
        assert made.folder.has_split
        held_out = made.folder.held_out()
        assert held_out is not None
        assert held_out.num_bytes == 17 * 3000  # 5 % of the first megabyte, in documents of 3,000 bytes
        time.sleep(2)
        paused = num_shards(made)
        # What is encoded at once, and what lies between two looks, comes in any case.
        assert 3 <= paused <= 3 + (5 << 20) // SHARD + 2
        writer.check()
        made.folder.request(EVERYTHING)
        until(lambda: (made.folder.train / "manifest.json").exists())
        until(lambda: not made.folder.lock.exists())
        writer.check()
    assert content(made) == expected
    assert num_shards(made) > paused


@pytest.mark.slow
def test_writer_when_killed_at_any_time_then_the_next_one_ends_with_the_same_bytes(
    rows: Path, expected: dict[str, bytes], byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    made = job(byte_tokenizer, tmp_path, rows)
    for number, kill in ((0, signal.SIGKILL), (7, signal.SIGKILL), (12, signal.SIGTERM)):
        with closing(begun(made, EVERYTHING)) as writer:
            until(lambda number=number: number == 0 or num_shards(made) >= number)
            time.sleep(0.05)
            os.kill(writer._process.pid, kill)
            until(lambda writer=writer: writer._process.exit_code is not None)
            if kill == signal.SIGKILL:
                writer.check()  # perhaps this process is being killed too
                time.sleep(2.1)
                with pytest.raises(UserError, match=r"was killed \(exit code -9\); start again: it continues"):
                    writer.check()
    with closing(begun(made, EVERYTHING)):
        until(lambda: (made.folder.train / "manifest.json").exists())
    assert content(made) == expected


@pytest.mark.slow
def test_second_writer_when_another_one_writes_then_waits_and_takes_over(
    rows: Path, expected: dict[str, bytes], byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    made = job(byte_tokenizer, tmp_path, rows)
    with closing(begun(made, 1)) as first:
        until(lambda: num_shards(made) >= 1)
        with closing(begun(made, EVERYTHING)) as second:
            # What the second one's run wants, the first one writes.
            until(lambda: (made.folder.train / "manifest.json").exists())
            first.check()
            second.check()
    assert content(made) == expected
    os.remove(made.folder.train / "manifest.json")
    os.remove(made.folder.train / "train_00040.json")
    with closing(begun(made, 1)) as first:
        until(lambda: made.folder.lock.exists())
        os.kill(first._process.pid, signal.SIGSTOP)
        with closing(begun(made, EVERYTHING)) as second:
            time.sleep(4)
            second.check()
            assert not (made.folder.train / "manifest.json").exists()
            os.kill(first._process.pid, signal.SIGKILL)
            # A dead process that nobody has asked after still has its number.
            until(lambda: first._process.exit_code is not None)
            until(lambda: (made.folder.train / "manifest.json").exists())
            second.check()
    assert content(made) == expected


def error_of(made: StreamJob) -> str:
    """What a writer fails with, within seconds."""
    with closing(begun(made, EVERYTHING)) as writer:
        until(lambda: writer._process.exit_code is not None, 30)
        with pytest.raises(UserError) as failure:
            writer.check()
        with pytest.raises(UserError, match=re.escape(str(failure.value))):  # and again
            writer.check()
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_writer_when_the_text_is_broken_then_says_so_in_one_line(rows: Path, byte_tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    broken = tmp_path / "broken.jsonl"
    broken.write_text(('{"text": "' + "a" * 1000 + '"}\n') * 9000 + '{"text": oh\n')
    made = job(byte_tokenizer, tmp_path, broken)
    assert "broken.jsonl" in error_of(made)
    assert num_shards(made) >= 1  # of what came before
    assert not made.folder.lock.exists()


def test_writer_when_the_folder_cannot_be_written_then_says_so_in_one_line(
    rows: Path, byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    made = job(byte_tokenizer, tmp_path, rows, validation_split_percentage=0)
    made.folder.path.mkdir()
    made.folder.train.write_text("in the way")
    assert "cannot be written (File exists); make room, or set HF_HOME" in error_of(made)


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


def start(made: StreamJob, tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    """A script that makes a writer, prints its number, and waits for its end or its own."""
    made.folder.path.mkdir(exist_ok=True)
    made.folder.request(1)
    (tmp_path / "job").write_bytes(pickle.dumps(made))
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "job"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_writer_when_made_by_a_script_without_guard_then_it_runs_once_and_all_is_written(
    rows: Path, expected: dict[str, bytes], byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    made = job(byte_tokenizer, tmp_path, rows)
    with start(made, tmp_path, "wait") as parent:
        printed, _ = parent.communicate(timeout=90)
    assert parent.returncode == 0
    assert len(printed.splitlines()) == 1
    assert content(made) == expected
    assert not made.folder.lock.exists()


@pytest.mark.parametrize("words", [(), ("fork",)])
def test_writer_when_its_parent_is_killed_then_is_gone_and_its_lock_too(
    rows: Path, byte_tokenizer, tmp_path: Path, words: tuple[str, ...]
) -> None:  # type: ignore[no-untyped-def]
    made = job(byte_tokenizer, tmp_path, rows)
    with start(made, tmp_path, *words) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        until(lambda: num_shards(made) >= 1)
        assert made.folder.lock.exists()
        for number in (signal.SIGINT, signal.SIGUSR1):  # which reach all processes, and are not for the writer
            os.kill(pid, number)
        time.sleep(0.2)
        os.kill(pid, 0)
        parent.kill()
    until(lambda: not Path(f"/proc/{pid}").exists(), 5)
    assert not made.folder.lock.exists()


def test_writer_when_closed_before_it_has_begun_then_is_gone_at_once(
    rows: Path, byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    made = job(byte_tokenizer, tmp_path, rows)
    writer = begun(made, 1)
    started = time.monotonic()
    writer.close()
    assert time.monotonic() - started < 2
    assert not made.folder.lock.exists()


def test_writer_when_the_tokenizer_cannot_be_read_there_then_says_so_in_one_line(
    rows: Path, byte_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    import __main__

    class Named(type(byte_tokenizer)):  # type: ignore[misc]
        """As if it were defined in a notebook."""

    Named.__module__, Named.__qualname__ = "__main__", "Named"
    monkeypatch.setattr(__main__, "Named", Named, raising=False)
    tokenizer = Named(tokenizer_object=byte_tokenizer.backend_tokenizer)
    assert "the stream cannot be written: AttributeError: " in error_of(job(tokenizer, tmp_path, rows))


@pytest.mark.slow
def test_writer_when_its_lock_was_taken_over_then_leaves_the_shards_to_the_other_and_waits(
    rows: Path, expected: dict[str, bytes], byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    made = job(byte_tokenizer, tmp_path, rows)
    with closing(begun(made, 2)) as writer:
        until(lambda: num_shards(made) >= 2)
        other = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": None, "id": "another"})
        made.folder.lock.write_text(other)
        time.sleep(1)
        before = content(made)
        made.folder.request(EVERYTHING)
        time.sleep(3)
        writer.check()
        assert content(made) == before
        assert not list(made.folder.train.glob(".*.tmp"))  # it has put its own away
        assert made.folder.lock.read_text() == other
        (made.folder.train / f".train_{len(before):05}.bin.dead.tmp").write_bytes(b"of a killed process")
        made.folder.lock.unlink()
        until(lambda: (made.folder.train / "manifest.json").exists())
        until(lambda: not made.folder.lock.exists())
    assert content(made) == expected
    assert sorted(path.name for path in made.folder.path.rglob(".*")) == []
