"""``python -m llm.runs``: what runs saved, how they ended, and the command that resumes them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llm.config.errors import UserError
from llm.config.exit_codes import run_command
from llm.config.reader import read_options
from llm.config.runs import RunsOptions
from llm.system.units import format_age, format_bytes
from llm.training.run_dir.inspect import RunSummary, SavedCheckpoint, is_run, read_run, resume_command, status_line

_HEADER = ("step", "saved", "loss", "eval", "size", "age", "")


def main(argv: Sequence[str] | None = None) -> int:
    """Lists the runs and returns the exit code."""
    return run_command(lambda: _list(sys.argv[1:] if argv is None else argv))


def _list(argv: Sequence[str]) -> int:
    options = read_options(
        RunsOptions,
        argv,
        prog="python -m llm.runs",
        description="Lists the checkpoints of runs, why each run's last start ended, and the command that resumes it.",
    )
    mistakes: list[str] = []
    num_damaged = 0
    for number, name in enumerate(options.runs):
        if number:
            print()
        path = Path(name).expanduser()
        try:
            shown = [path] if is_run(path) else _runs_below(path)
            runs = [read_run(found, verify=options.verify) for found in shown]
        except OSError as error:
            mistakes.append(f"{name}: cannot be read ({error.strerror})")
            continue
        if not runs:
            mistakes.append(f"{name}: no run there; give a run's --output_dir, or a folder that holds some")
        for line in _details(runs[0], options.verify) if shown == [path] else _lines(runs):
            print(line)
        num_damaged += sum(len(run.checkpoints) - len(run.good) for run in runs)
    if mistakes:
        raise UserError("\n".join(mistakes))
    return 1 if options.verify and num_damaged else 0


def _runs_below(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    return [child for child in folders if is_run(child)]


def _lines(runs: Sequence[RunSummary]) -> list[str]:
    """One line a run."""
    rows = []
    for run in runs:
        newest = run.good[-1] if run.good else None
        num_damaged = len(run.checkpoints) - len(run.good)
        rows.append(
            (
                str(run.path),
                f"{len(run.good)} good" + (f", {num_damaged} damaged" if num_damaged else ""),
                format_bytes(sum(checkpoint.num_bytes for checkpoint in run.checkpoints)),
                f"newest step {newest.step}, {_age(newest)} old" if newest else "no checkpoint",
                status_line(run),
            )
        )
    return _aligned(rows, right=())


def _details(run: RunSummary, verified: bool) -> list[str]:
    """All about one run."""
    lines = [f"{run.path}: {status_line(run)}"]
    if run.num_steps is not None:
        lines[0] += f"; {run.num_steps} updates in all"
    if run.checkpoints:
        rows = [_HEADER, *(_row(checkpoint, run) for checkpoint in run.checkpoints)]
        lines += [f"  {line}" for line in _aligned(rows, right=(0, 2, 3, 4, 5))]
        read = "every byte was read" if verified else "names and sizes are right; --verify reads every byte"
        lines.append(f"  good: {read}")
    else:
        lines.append("  no checkpoint")
    if run.num_abandoned:
        place = run.path / "checkpoints" / "abandoned"
        lines.append(f"  {place} holds {run.num_abandoned} that a resume from an older one left behind")
    if run.left_alone:
        names = ", ".join(path.name for path in run.left_alone)
        lines.append(f"  damaged or not this run's, and removed by no run: {names}")
    if run.status.get("state") == "done":
        lines.append("  nothing is left to resume")
    elif run.holder is None:
        command = resume_command(run)
        where = f" on each of {run.num_nodes} nodes, of which FIRST_NODE is one" if run.num_nodes > 1 else ""
        said = f"  resume{where}: {command}"
        lines.append(said if command else "  no config.toml can be read: resume as it was started")
    return lines


def _row(checkpoint: SavedCheckpoint, run: RunSummary) -> tuple[str, ...]:
    marks = ["good"] if checkpoint.problem is None else [f"damaged: {checkpoint.problem}"]
    if checkpoint.is_external:
        marks = ["another program's"]
    if run.good and checkpoint is run.good[-1]:
        marks.append("newest")
    if checkpoint is run.best:
        marks.append("best")
    return (
        str(checkpoint.step),
        "+".join(checkpoint.reasons) or "-",
        _loss(checkpoint.train_loss),
        _loss(checkpoint.eval_loss),
        format_bytes(checkpoint.num_bytes),
        _age(checkpoint),
        ", ".join(marks),
    )


def _aligned(rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...]) -> list[str]:
    """The rows as lines, in columns; those of `right` end below each other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _age(checkpoint: SavedCheckpoint) -> str:
    return format_age(time.time() - checkpoint.saved_at)


if __name__ == "__main__":
    sys.exit(main())
