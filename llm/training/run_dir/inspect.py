"""What a run's folder says about the run from outside, without torch: how it ended, what it saved, how it goes on."""

from __future__ import annotations

import json
import math
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.files.lock import lock_holder
from llm.files.manifest import MANIFEST, find_damage
from llm.training.checkpoints.layout import (
    ABANDONED,
    eval_loss,
    is_external,
    read_state,
    saved_steps,
    unmanaged_paths,
)
from llm.training.run_dir.layout import CHECKPOINTS, CONFIG, LOCK, METRICS, SIGNS_OF_A_START, STATUS

# The last record is in the last bytes of metrics.jsonl, unless it holds long samples.
_TAIL_BYTES = 1 << 16
# Where the nodes meet; torchrun's own default.
_PORT = 29400


@dataclass(frozen=True)
class SavedCheckpoint:
    """A folder in `checkpoints/`.

    Attributes:
        path: the folder.
        step: finished updates.
        num_bytes: its size on disk.
        saved_at: seconds since 1970.
        problem: what is wrong with it; None for a good one.
        state: its training state; empty where it cannot be read.
        is_external: another program wrote it.
    """

    path: Path
    step: int
    num_bytes: int
    saved_at: float
    problem: str | None
    state: dict[str, Any]
    is_external: bool

    @property
    def reasons(self) -> list[str]:
        """Why it was saved: regular, timed, asked, best, stop, end."""
        return [str(reason) for reason in self.state.get("reasons", [])]

    @property
    def train_loss(self) -> float | None:
        """Nats a token of the newest record before it."""
        loss = self.state["progress"]["train_loss"] if self.state else None
        return None if loss is None else float(loss)

    @property
    def eval_loss(self) -> float | None:
        """Nats a token, if it was evaluated."""
        loss = eval_loss(self.state) if self.state else math.inf
        return loss if math.isfinite(loss) else None


@dataclass(frozen=True)
class RunSummary:
    """A run's folder as it is now.

    Attributes:
        path: the folder, as it was named.
        status: what status.json says; empty where there is none.
        holder: host and process of the start that goes on now; None when none does.
        last_step: update of the last record; None before the first.
        checkpoints: oldest first.
        num_abandoned: checkpoints of branches that a resume left.
        left_alone: what lies in `checkpoints/` and no run removes.
    """

    path: Path
    status: dict[str, Any]
    holder: tuple[str, int] | None
    last_step: int | None
    checkpoints: list[SavedCheckpoint]
    num_abandoned: int
    left_alone: list[Path]

    @property
    def good(self) -> list[SavedCheckpoint]:
        """The good checkpoints, oldest first."""
        return [checkpoint for checkpoint in self.checkpoints if checkpoint.problem is None]

    @property
    def best(self) -> SavedCheckpoint | None:
        """The good one with the lowest evaluation loss, which `--resume_from_checkpoint best` takes."""
        measured = [(c.eval_loss, -c.step, c) for c in self.good if c.eval_loss is not None]
        return min(measured)[2] if measured else None

    @property
    def num_steps(self) -> int | None:
        """Updates of the whole run, if a checkpoint says it."""
        return next((int(c.state["plan"]["num_steps"]) for c in reversed(self.good) if c.state), None)

    @property
    def num_nodes(self) -> int:
        """Machines of the start that saved the newest checkpoint; 1 if none says it."""
        return int(self._world.get("num_nodes", 1))

    @property
    def num_processes(self) -> int:
        """Processes of that start on each of them."""
        return -(-int(self._world.get("num_processes", 1)) // self.num_nodes)

    @property
    def _world(self) -> dict[str, Any]:
        world: dict[str, Any] = next((c.state.get("world", {}) for c in reversed(self.good) if c.state), {})
        return world


def is_run(path: Path) -> bool:
    """Whether a run has written into this folder."""
    return any((path / name).exists() for name in SIGNS_OF_A_START)


def read_run(path: Path, *, verify: bool) -> RunSummary:
    """Reads a run's folder, which may be in use.

    Args:
        path: the folder.
        verify: whether every byte of every checkpoint is read; otherwise names, sizes and manifests are looked at.
    """
    folder = path / CHECKPOINTS
    found = [_checkpoint(step, saved, verify) for step, saved in saved_steps(folder)]
    return RunSummary(
        path=path,
        status=_read_status(path / STATUS),
        holder=lock_holder(path / LOCK),
        last_step=_last_step(path / METRICS),
        # A run that goes on removes what it does not need while we look.
        checkpoints=[checkpoint for checkpoint in found if checkpoint.path.is_dir()],
        num_abandoned=len(saved_steps(folder / ABANDONED)),
        left_alone=unmanaged_paths(folder),
    )


def status_line(run: RunSummary) -> str:
    """One line: whether the run goes on, or why its last start ended."""
    status, step = run.status, run.status.get("step", run.last_step)
    at_step = f" after step {step}" if step is not None else ""
    if not status:
        ended = "no status.json can be read: no start got as far as training"
    elif status["state"] == "running":
        if run.holder is not None:
            return f"running, process {run.holder[1]} on {run.holder[0]}{at_step}"
        ended = f"killed{at_step}: status.json says running, but no process holds the folder any more"
    else:
        reason = f": {' '.join(str(status['reason']).split())}" if status.get("reason") else ""
        ended = f"{status['state']}{at_step}{reason} (exit code {status.get('exit_code', '?')})"
    if run.holder is not None:
        return f"starting, process {run.holder[1]} on {run.holder[0]}; before that {ended}"
    return ended


def resume_command(run: RunSummary) -> str | None:
    """The shell command that continues the run from its newest good checkpoint; None without its config.toml.

    A run with relative paths goes on in the folder where it was started. Of a run on several nodes it is what starts
    on each of them, with FIRST_NODE for the name of one.
    """
    config = run.path / CONFIG
    try:
        named = Path(tomllib.loads(config.read_text())["output"]["output_dir"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    before, more = "", []
    if not (named.exists() and named.samefile(run.path)):
        whole = run.path.resolve()
        if not named.is_absolute() and ".." not in named.parts and whole.parts[-len(named.parts) :] == named.parts:
            before = f"cd {shlex.quote(str(whole.parents[len(named.parts) - 1]))} && "
            config = named / config.name
        else:  # it was moved
            more = ["--output_dir", str(run.path)]
    words = [*_launcher(run), "-m", "llm.trainers.gpt", "--config", str(config), *more, "--resume_from_checkpoint"]
    return before + shlex.join(words)


def _launcher(run: RunSummary) -> list[str]:
    if run.num_nodes == 1 and run.num_processes == 1:
        return ["python"]
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"FIRST_NODE:{_PORT}"]
    nodes = ["--nnodes", str(run.num_nodes), *meeting] if run.num_nodes > 1 else []
    return ["torchrun", *nodes, "--nproc_per_node", str(run.num_processes)]


def _checkpoint(step: int, path: Path, verify: bool) -> SavedCheckpoint:
    foreign = is_external(path)
    problem = None if foreign else find_damage(path, read_content=verify)
    state: dict[str, Any] = {}
    sizes = [0]
    saved_at = 0.0
    try:
        if not foreign and problem is None:
            state = read_state(path)
        files = [file.stat() for file in path.rglob("*") if file.is_file()]
        sizes = [file.st_size for file in files]
        written = path / MANIFEST
        saved_at = written.stat().st_mtime if written.is_file() else max((file.st_mtime for file in files), default=0.0)
    except (OSError, ValueError) as error:
        problem = problem or f"cannot be read ({error})"
    return SavedCheckpoint(path, step, sum(sizes), saved_at, problem, state, foreign)


def _read_status(path: Path) -> dict[str, Any]:
    try:
        status = json.loads(path.read_bytes())
        return {"state": str(status["state"]), **status}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _last_step(metrics: Path) -> int | None:
    try:
        with open(metrics, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill, or by our own cut
    return None
