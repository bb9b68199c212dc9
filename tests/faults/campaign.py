"""Kills a run again and again, and looks at what is left: the promises of the checkpoints, counted.

Every start is a process of its own that is killed by SIGKILL with all its children, as a scheduler does it. It
comes from a fork server that has the libraries loaded already, so that hundreds of starts take minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from multiprocessing.process import BaseProcess
from pathlib import Path

from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm.files.manifest import find_damage
from llm.training.checkpoints.store import saved_steps

_LONGEST_SECONDS = 120.0
_OF_TIME = ("data_wait", "mfu", "seconds", "per_second")

_servers = multiprocessing.get_context("forkserver")
_servers.set_forkserver_preload(
    ["llm.trainers.gpt", "llm.training.run", "torch.utils.tensorboard", "matplotlib.pyplot"]
)


@dataclass
class Tally:
    """What happened to the runs of a campaign.

    Attributes:
        num_kills: starts that were killed.
        num_kills_in_writes: of these, the ones while a checkpoint was being written.
        num_refused: starts that ended by themselves, and not well.
        num_torn: checkpoints under their final name that are not what they should be.
        num_lost: updates that were said to be saved and were not there at the next start.
        words: what went wrong, for the reader.
    """

    num_kills: int = 0
    num_kills_in_writes: int = 0
    num_refused: int = 0
    num_torn: int = 0
    num_lost: int = 0
    words: list[str] = field(default_factory=list)


def _run(words: Sequence[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from llm.trainers.gpt import main

    sys.exit(main(list(words)))


class Start:
    """One start of a run: one process, or several that form a world."""

    def __init__(self, words: Sequence[str], log: Path, num_ranks: int) -> None:
        self.log = log
        self._ranks: list[BaseProcess] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank in range(num_ranks):
            world = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            name = str(log) if rank == 0 else f"{log}.{rank}"
            process = _servers.Process(target=_run, args=(words, name, world if num_ranks > 1 else {}))
            process.start()
            self._ranks.append(process)

    def is_alive(self) -> bool:
        return all(rank.is_alive() for rank in self._ranks)

    def kill(self) -> None:
        """Kills every process of the run, and their children, at once."""
        for rank in self._ranks:
            assert rank.pid is not None
            try:
                os.killpg(rank.pid, signal.SIGKILL)
            except ProcessLookupError:
                rank.kill()
        for rank in self._ranks:
            rank.join()

    def wait(self) -> list[int | None]:
        """The exit codes; a run that does not end is killed."""
        deadline = time.monotonic() + _LONGEST_SECONDS
        for rank in self._ranks:
            rank.join(max(deadline - time.monotonic(), 0))
        if any(rank.is_alive() for rank in self._ranks):
            self.kill()
        return [rank.exitcode for rank in self._ranks]

    def words(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def run_whole(words: Sequence[str], folder: Path, num_ranks: int) -> float:
    """The undisturbed run; says how many seconds it took."""
    started = time.monotonic()
    start = Start([*words, "--output_dir", str(folder)], folder.with_suffix(".log"), num_ranks)
    codes = start.wait()
    assert codes == [0] * num_ranks, start.words()
    return time.monotonic() - started


def run_killed(
    words: Sequence[str], folder: Path, num_ranks: int, *, num_kills: int, seconds: float, draw: random.Random
) -> Tally:
    """The same run, killed `num_kills` times and then left alone.

    Args:
        words: its options.
        folder: its folder.
        num_ranks: processes of the run.
        num_kills: every second one falls into a write.
        seconds: how long the run takes undisturbed.
        draw: the instants.
    """
    tally = Tally()
    saved = 0
    words = [*words, "--output_dir", str(folder), "--resume_from_checkpoint"]
    while True:
        log = folder.with_name(f"{folder.name}.{tally.num_kills}.log")
        start = Start(words, log, num_ranks)
        if tally.num_kills < num_kills:
            in_write = bool(tally.num_kills % 2)
            wait_seconds = draw.uniform(0.1, max(seconds * 0.7, 0.5))
            was_writing = _wait_for_the_instant(start, folder, in_write, wait_seconds, draw)
            if start.is_alive():
                start.kill()
                tally.num_kills += 1
                tally.num_kills_in_writes += was_writing
                saved = _look(start, folder, saved, tally)
                continue
        codes = start.wait()
        _look(start, folder, saved, tally)
        if codes != [0] * num_ranks:
            tally.num_refused += 1
            tally.words.append(f"ended with {codes}: {start.words()[-1000:]}")
            return tally
        if tally.num_kills >= num_kills:
            return tally
        # It was done before it could be killed: its last checkpoint is taken away, and it goes on.
        _forget_the_end(folder, draw)
        saved = max((step for step, _ in saved_steps(folder / "checkpoints")), default=0)


def _wait_for_the_instant(start: Start, folder: Path, in_write: bool, seconds: float, draw: random.Random) -> bool:
    """Waits for a random moment, or for one inside a write; whether a checkpoint is being written now."""
    checkpoints = folder / "checkpoints"
    deadline = time.monotonic() + seconds
    while start.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    deadline = time.monotonic() + 20
    while in_write and start.is_alive() and time.monotonic() < deadline:
        if any(checkpoints.glob(".step_*.tmp")):
            time.sleep(draw.uniform(0, 0.02))
            break
        time.sleep(0.0005)
    return any(checkpoints.glob(".step_*.tmp"))


def _look(start: Start, folder: Path, saved: int, tally: Tally) -> int:
    """Checks what a start left, and says what is durable now."""
    text = start.words()
    resumed = re.search(r"resumed from step (\d+)", text)
    if saved and resumed is None and re.search(r"^step \d", text, re.MULTILINE):
        tally.num_lost += saved
        tally.words.append(f"step {saved} was saved, and the run began anew")
    if resumed is not None and int(resumed[1]) < saved:
        tally.num_lost += saved - int(resumed[1])
        tally.words.append(f"step {saved} was saved, and the run went on from {resumed[1]}")
    for _, path in saved_steps(folder / "checkpoints"):
        if (problem := find_damage(path)) is not None:
            tally.num_torn += 1
            tally.words.append(f"{path.name}: {problem}")
    return max([saved, *(int(step) for step in re.findall(r"^saved step (\d+)$", text, re.MULTILINE))])


def _forget_the_end(folder: Path, draw: random.Random) -> None:
    steps = saved_steps(folder / "checkpoints")
    for _, path in steps[draw.randrange(len(steps)) :]:
        shutil.rmtree(path)
    for name in ("model.safetensors", "all_results.json"):
        (folder / name).unlink(missing_ok=True)


def differences(whole: Path, killed: Path) -> list[str]:
    """What differs between the ends of two runs: bits of the weights, records and curves apart from times."""
    found = []
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    if one.keys() != other.keys():
        found.append("the names of the weights")
    found += [name for name in one if one[name].tobytes() != other[name].tobytes()]
    for name in ("metrics.jsonl", "all_results.json"):
        records = zip_longest(_untimed(whole / name), _untimed(killed / name))
        pairs = [f"{name}: {a} and {b}" for a, b in records if a != b]
        found += pairs[:2]
    mine, others = _series(whole), _series(killed)
    return found + [f"tensorboard: {tag}" for tag in sorted({*mine, *others}) if mine.get(tag) != others.get(tag)]


def _series(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values that TensorBoard shows, of all event files together, without those of time and speed."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.endswith(_OF_TIME)
    }


def _untimed(path: Path) -> list[dict[str, object]]:
    """The records of a file without the fields of time and speed."""
    text = path.read_text()
    records = [json.loads(text)] if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in record.items() if not key.endswith(_OF_TIME)} for record in records]
