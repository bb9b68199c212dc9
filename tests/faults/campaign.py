"""Kill a run repeatedly and count the violations of what its checkpoints guarantee.

Every start is its own process, which is killed by SIGKILL with all its children, as a scheduler does it. The
processes come from a fork server that has imported the libraries already, so that hundreds of starts take minutes.
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

_TIMEOUT_SECONDS = 120.0
_TIMING_SUFFIXES = ("data_wait", "mfu", "seconds", "per_second")

_servers = multiprocessing.get_context("forkserver")
_servers.set_forkserver_preload(
    ["llm.trainers.gpt", "llm.training.run", "torch.utils.tensorboard", "matplotlib.pyplot"]
)


@dataclass
class Tally:
    """Counts of what happened to the starts of a campaign.

    Attributes:
        num_kills: starts that were killed.
        num_kills_in_writes: the part of `num_kills` that fell into the write of a checkpoint.
        num_refused: starts that ended by themselves with an exit code other than 0.
        num_damaged: damaged checkpoints under their final name.
        num_lost: steps that were reported as saved and were missing at the next start.
        problems: descriptions of what went wrong.
    """

    num_kills: int = 0
    num_kills_in_writes: int = 0
    num_refused: int = 0
    num_damaged: int = 0
    num_lost: int = 0
    problems: list[str] = field(default_factory=list)


def _run(words: Sequence[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from llm.trainers.gpt import main

    sys.exit(main(list(words)))


class Start:
    """One start of a run: one process, or one process per rank."""

    def __init__(self, words: Sequence[str], log: Path, num_ranks: int) -> None:
        """Start the trainer with these options; rank 0 writes its output to `log`, rank N to `log`.N."""
        self.log = log
        self._ranks: list[BaseProcess] = []
        with socket.socket() as free_port:
            free_port.bind(("127.0.0.1", 0))
            port = str(free_port.getsockname()[1])
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
        """Whether every rank is running."""
        return all(rank.is_alive() for rank in self._ranks)

    def kill(self) -> None:
        """Kill every process of the run and their children at once."""
        for rank in self._ranks:
            assert rank.pid is not None
            try:
                os.killpg(rank.pid, signal.SIGKILL)
            except ProcessLookupError:
                rank.kill()
        for rank in self._ranks:
            rank.join()

    def wait(self) -> list[int | None]:
        """Return the exit codes of the ranks; a run that does not end is killed after 120 s."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        for rank in self._ranks:
            rank.join(max(deadline - time.monotonic(), 0))
        if any(rank.is_alive() for rank in self._ranks):
            self.kill()
        return [rank.exitcode for rank in self._ranks]

    def output(self) -> str:
        """Return what rank 0 has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def run_uninterrupted(words: Sequence[str], folder: Path, num_ranks: int) -> float:
    """Run without kills, and return the seconds that it took."""
    started = time.monotonic()
    start = Start([*words, "--output_dir", str(folder)], folder.with_suffix(".log"), num_ranks)
    codes = start.wait()
    assert codes == [0] * num_ranks, start.output()
    return time.monotonic() - started


def run_killed(
    words: Sequence[str], folder: Path, num_ranks: int, *, num_kills: int, seconds: float, draw: random.Random
) -> Tally:
    """Run, kill the run `num_kills` times, resume it to its end, and return the counts.

    Args:
        words: options without `--output_dir`.
        folder: the run's folder.
        num_ranks: processes of the run.
        num_kills: number of kills; every second one aims at the write of a checkpoint.
        seconds: duration of the run without kills.
        draw: random numbers that choose the instants.
    """
    tally = Tally()
    saved = 0
    words = [*words, "--output_dir", str(folder), "--resume_from_checkpoint"]
    while True:
        log = folder.with_name(f"{folder.name}.{tally.num_kills}.log")
        start = Start(words, log, num_ranks)
        if tally.num_kills < num_kills:
            in_write = tally.num_kills % 2 == 1
            wait_seconds = draw.uniform(0.1, max(seconds * 0.7, 0.5))
            was_writing = _wait_for_instant(start, folder, in_write, wait_seconds, draw)
            if start.is_alive():
                start.kill()
                tally.num_kills += 1
                if was_writing:
                    tally.num_kills_in_writes += 1
                saved = _inspect(start, folder, saved, tally)
                continue
        codes = start.wait()
        _inspect(start, folder, saved, tally)
        if codes != [0] * num_ranks:
            tally.num_refused += 1
            tally.problems.append(f"ended with {codes}: {start.output()[-1000:]}")
            return tally
        if tally.num_kills >= num_kills:
            return tally
        # The run ended before it could be killed: remove its last checkpoints, so that it can be resumed.
        _remove_last_checkpoints(folder, draw)
        saved = max((step for step, _ in saved_steps(folder / "checkpoints")), default=0)


def _wait_for_instant(start: Start, folder: Path, in_write: bool, seconds: float, draw: random.Random) -> bool:
    """Wait for these seconds, then with `in_write` for a write; return whether a checkpoint is being written."""
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


def _inspect(start: Start, folder: Path, saved: int, tally: Tally) -> int:
    """Check the checkpoints that a start left, and return the last step that it or an earlier start saved."""
    text = start.output()
    resumed = re.search(r"resumed from step (\d+)", text)
    if saved and resumed is None and re.search(r"^step \d", text, re.MULTILINE):
        tally.num_lost += saved
        tally.problems.append(f"step {saved} was saved, and the run started from scratch")
    if resumed is not None and int(resumed[1]) < saved:
        tally.num_lost += saved - int(resumed[1])
        tally.problems.append(f"step {saved} was saved, and the run resumed from {resumed[1]}")
    for _, path in saved_steps(folder / "checkpoints"):
        if (problem := find_damage(path)) is not None:
            tally.num_damaged += 1
            tally.problems.append(f"{path.name}: {problem}")
    return max([saved, *(int(step) for step in re.findall(r"^saved step (\d+)$", text, re.MULTILINE))])


def _remove_last_checkpoints(folder: Path, draw: random.Random) -> None:
    """Remove a random number of the newest checkpoints, at least one, and the finished model."""
    steps = saved_steps(folder / "checkpoints")
    for _, path in steps[draw.randrange(len(steps)) :]:
        shutil.rmtree(path)
    for name in ("model.safetensors", "all_results.json"):
        (folder / name).unlink(missing_ok=True)


def differences(uninterrupted: Path, killed: Path) -> list[str]:
    """Return what differs between two finished runs: bits of the weights, records and curves, except times."""
    one, other = (load_file(folder / "model.safetensors") for folder in (uninterrupted, killed))
    if one.keys() != other.keys():
        return ["the names of the weights"]
    different = [name for name in one if one[name].tobytes() != other[name].tobytes()]
    for name in ("metrics.jsonl", "all_results.json"):
        records = zip_longest(_untimed(uninterrupted / name), _untimed(killed / name))
        pairs = [f"{name}: {a} and {b}" for a, b in records if a != b]
        different += pairs[:2]
    curves, other_curves = _curves(uninterrupted), _curves(killed)
    tags = sorted({*curves, *other_curves})
    return different + [f"tensorboard: {tag}" for tag in tags if curves.get(tag) != other_curves.get(tag)]


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values by tag from all TensorBoard files of a run, without those of time and speed."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.endswith(_TIMING_SUFFIXES)
    }


def _untimed(path: Path) -> list[dict[str, object]]:
    """Return the records of a file without the fields of time and speed."""
    text = path.read_text()
    records = [json.loads(text)] if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in record.items() if not key.endswith(_TIMING_SUFFIXES)} for record in records]
