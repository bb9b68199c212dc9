"""Summary of a run from its folder: how it ended, which checkpoints it has, and the command that resumes it.

Importing this module does not import torch.
"""

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

# The last record of metrics.jsonl is in its last bytes, unless it holds long samples.
_TAIL_BYTES = 1 << 16
# Port of the rendezvous of the nodes. Source: the default of torchrun.
_RENDEZVOUS_PORT = 29400


@dataclass(frozen=True)
class SavedCheckpoint:
    """A folder in `checkpoints/`.

    Attributes:
        path: the folder.
        step: finished updates.
        num_bytes: its size on disk.
        saved_at: seconds since 1970.
        problem: the damage that was found; None for a good checkpoint.
        state: its training state; empty if it cannot be read.
        is_external: whether another program wrote it.
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
        """Training loss in nats a token of the newest record before the checkpoint; None if there is none."""
        loss = self.state["progress"]["train_loss"] if self.state else None
        return None if loss is None else float(loss)

    @property
    def eval_loss(self) -> float | None:
        """Evaluation loss in nats a token; None if the weights were not evaluated."""
        loss = eval_loss(self.state) if self.state else math.inf
        return loss if math.isfinite(loss) else None


@dataclass(frozen=True)
class RunSummary:
    """The state of a run's folder.

    Attributes:
        path: the folder, as the caller named it.
        status: the content of status.json; empty if it cannot be read.
        holder: host and process id of the start that uses the folder now; None if there is none.
        last_step: step of the last record in metrics.jsonl; None before the first record.
        checkpoints: oldest first.
        num_abandoned: checkpoints that a resume from an older checkpoint moved to `checkpoints/abandoned`.
        unmanaged_paths: entries of `checkpoints/` that no run removes.
    """

    path: Path
    status: dict[str, Any]
    holder: tuple[str, int] | None
    last_step: int | None
    checkpoints: list[SavedCheckpoint]
    num_abandoned: int
    unmanaged_paths: list[Path]

    @property
    def good(self) -> list[SavedCheckpoint]:
        """The checkpoints without damage, oldest first."""
        return [checkpoint for checkpoint in self.checkpoints if checkpoint.problem is None]

    @property
    def best(self) -> SavedCheckpoint | None:
        """The good checkpoint with the lowest evaluation loss, which `--resume_from_checkpoint best` takes."""
        evaluated = [(c.eval_loss, -c.step, c) for c in self.good if c.eval_loss is not None]
        return min(evaluated)[2] if evaluated else None

    @property
    def num_steps(self) -> int | None:
        """Updates of the complete run; None if no checkpoint records them."""
        return next((int(c.state["plan"]["num_steps"]) for c in reversed(self.good) if c.state), None)

    @property
    def num_nodes(self) -> int:
        """Nodes of the start that saved the newest checkpoint; 1 if no checkpoint records them."""
        return int(self._world.get("num_nodes", 1))

    @property
    def num_processes(self) -> int:
        """Processes on each node of the start that saved the newest checkpoint; 1 if no checkpoint records them."""
        return -(-int(self._world.get("num_processes", 1)) // self.num_nodes)

    @property
    def _world(self) -> dict[str, Any]:
        world: dict[str, Any] = next((c.state.get("world", {}) for c in reversed(self.good) if c.state), {})
        return world


def is_run(path: Path) -> bool:
    """Return whether a run has written into this folder."""
    return any((path / name).exists() for name in SIGNS_OF_A_START)


def read_run(path: Path, *, verify: bool) -> RunSummary:
    """Read a run's folder, which may be in use.

    Args:
        path: the folder.
        verify: whether to read every byte of every checkpoint; otherwise only names, sizes and manifests are checked.
    """
    checkpoints_dir = path / CHECKPOINTS
    checkpoints = [_read_checkpoint(step, saved, verify) for step, saved in saved_steps(checkpoints_dir)]
    return RunSummary(
        path=path,
        status=_read_status(path / STATUS),
        holder=lock_holder(path / LOCK),
        last_step=_last_step(path / METRICS),
        # An active run may have removed a checkpoint while it was read here.
        checkpoints=[checkpoint for checkpoint in checkpoints if checkpoint.path.is_dir()],
        num_abandoned=len(saved_steps(checkpoints_dir / ABANDONED)),
        unmanaged_paths=unmanaged_paths(checkpoints_dir),
    )


def status_line(run: RunSummary) -> str:
    """Return one line: whether the run is running, or why its last start ended."""
    status = run.status
    step = status.get("step", run.last_step)
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
    """Return the shell command that resumes the run from its newest good checkpoint; None if config.toml is missing.

    A run with a relative output folder is resumed in the folder where it was started. For a run on several nodes, the
    command must be started on each node, and the user replaces FIRST_NODE by the name of one node.
    """
    config = run.path / CONFIG
    try:
        output_dir = Path(tomllib.loads(config.read_text())["output"]["output_dir"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    change_dir = ""
    arguments = []
    if not (output_dir.exists() and output_dir.samefile(run.path)):
        absolute = run.path.resolve()
        is_relative = not output_dir.is_absolute() and ".." not in output_dir.parts
        if is_relative and absolute.parts[-len(output_dir.parts) :] == output_dir.parts:
            change_dir = f"cd {shlex.quote(str(absolute.parents[len(output_dir.parts) - 1]))} && "
            config = output_dir / config.name
        else:  # the folder was moved
            arguments = ["--output_dir", str(run.path)]
    command = [*_launcher(run), "-m", "llm.trainers.gpt", "--config", str(config), *arguments]
    return change_dir + shlex.join([*command, "--resume_from_checkpoint"])


def _launcher(run: RunSummary) -> list[str]:
    if run.num_nodes == 1 and run.num_processes == 1:
        return ["python"]
    nodes = []
    if run.num_nodes > 1:
        rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"FIRST_NODE:{_RENDEZVOUS_PORT}"]
        nodes = ["--nnodes", str(run.num_nodes), *rendezvous]
    return ["torchrun", *nodes, "--nproc_per_node", str(run.num_processes)]


def _read_checkpoint(step: int, path: Path, verify: bool) -> SavedCheckpoint:
    from_other_program = is_external(path)
    problem = None if from_other_program else find_damage(path, read_content=verify)
    state: dict[str, Any] = {}
    num_bytes = 0
    saved_at = 0.0
    try:
        if not from_other_program and problem is None:
            state = read_state(path)
        files = [file.stat() for file in path.rglob("*") if file.is_file()]
        num_bytes = sum(file.st_size for file in files)
        manifest = path / MANIFEST
        if manifest.is_file():
            saved_at = manifest.stat().st_mtime
        else:
            saved_at = max((file.st_mtime for file in files), default=0.0)
    except (OSError, ValueError) as error:
        problem = problem or f"cannot be read ({error})"
    return SavedCheckpoint(
        path=path,
        step=step,
        num_bytes=num_bytes,
        saved_at=saved_at,
        problem=problem,
        state=state,
        is_external=from_other_program,
    )


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
            continue  # cut by a kill, or by the seek above
    return None
