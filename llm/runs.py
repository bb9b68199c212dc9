"""``python -m llm.runs``: list the checkpoints of runs, how the runs ended, and the command that resumes them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llm.config.errors import UserError
from llm.config.exit_codes import run_command
from llm.config.option import OptionGroup, option
from llm.config.reader import read_options
from llm.system.units import format_age, format_bytes
from llm.training.checkpoints.layout import ABANDONED
from llm.training.run_dir.inspect import RunSummary, SavedCheckpoint, is_run, read_run, resume_command, status_line
from llm.training.run_dir.layout import CHECKPOINTS

_HEADER = ("step", "saved", "loss", "eval", "size", "age", "")
_NUMERIC_COLUMNS = (0, 2, 3, 4, 5)


class RunsOptions(OptionGroup):
    """The options of ``python -m llm.runs``."""

    runs: tuple[str, ...] = option(
        (".",), "folders of runs, or folders that hold runs (default: this one)", positional=True, metavar="OUTPUT_DIR"
    )
    verify: bool = option(False, "read every byte of every checkpoint; exit code 1 if one is damaged")


def main(argv: Sequence[str] | None = None) -> int:
    """List the runs and return the exit code.

    Args:
        argv: the command line without the program's name; `sys.argv[1:]` when None.
    """
    return run_command(lambda: _list_runs(sys.argv[1:] if argv is None else argv))


def _list_runs(argv: Sequence[str]) -> int:
    options = read_options(
        RunsOptions,
        argv,
        prog="python -m llm.runs",
        description="List the checkpoints of runs, why the last start of each run ended, and the command that resumes"
        " it.",
    )
    mistakes: list[str] = []
    num_damaged = 0
    for number, name in enumerate(options.runs):
        if number:
            print()
        path = Path(name).expanduser()
        try:
            is_single = is_run(path)
            folders = [path] if is_single else _runs_in(path)
            runs = [read_run(folder, verify=options.verify) for folder in folders]
        except OSError as error:
            mistakes.append(f"{name}: cannot be read ({error.strerror})")
            continue
        if not runs:
            mistakes.append(f"{name}: not a run and holds none; give a run's --output_dir, or a folder of runs")
        for line in _detailed_lines(runs[0], options.verify) if is_single else _summary_lines(runs):
            print(line)
        num_damaged += sum(len(run.checkpoints) - len(run.good) for run in runs)
    if mistakes:
        raise UserError("\n".join(mistakes))
    return 1 if options.verify and num_damaged else 0


def _runs_in(path: Path) -> list[Path]:
    """Return the folders of runs inside a folder."""
    if not path.is_dir():
        return []
    folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    return [folder for folder in folders if is_run(folder)]


def _summary_lines(runs: Sequence[RunSummary]) -> list[str]:
    """Return one line a run."""
    rows = []
    for run in runs:
        newest = run.good[-1] if run.good else None
        num_damaged = len(run.checkpoints) - len(run.good)
        rows.append(
            (
                str(run.path),
                f"{len(run.good)} good, {num_damaged} damaged" if num_damaged else f"{len(run.good)} good",
                format_bytes(sum(checkpoint.num_bytes for checkpoint in run.checkpoints)),
                f"newest step {newest.step}, {_age(newest)} old" if newest else "no checkpoint",
                status_line(run),
            )
        )
    return _align(rows, right=())


def _detailed_lines(run: RunSummary, verified: bool) -> list[str]:
    """Return the lines on one run: its state, each checkpoint, and the command that resumes it."""
    length = "" if run.num_steps is None else f"; {run.num_steps} steps in total"
    lines = [f"{run.path}: {status_line(run)}{length}"]
    if run.checkpoints:
        rows = [_HEADER, *(_row(checkpoint, run) for checkpoint in run.checkpoints)]
        lines += [f"  {line}" for line in _align(rows, right=_NUMERIC_COLUMNS)]
        meaning = "every byte was read" if verified else "names and sizes are right; --verify reads every byte"
        lines.append(f"  good: {meaning}")
    else:
        lines.append("  no checkpoint")
    if run.num_abandoned:
        abandoned = run.path / CHECKPOINTS / ABANDONED
        lines.append(f"  {abandoned} holds {run.num_abandoned} that a resume from an older checkpoint moved there")
    if run.unmanaged_paths:
        names = ", ".join(path.name for path in run.unmanaged_paths)
        lines.append(f"  damaged or not this run's, and removed by no run: {names}")
    if run.status.get("state") == "done":
        lines.append("  nothing is left to resume")
    elif run.holder is None:
        lines.append(f"  {_resume_line(run)}")
    return lines


def _resume_line(run: RunSummary) -> str:
    command = resume_command(run)
    if command is None:
        return "config.toml cannot be read: resume with the command that started the run"
    if run.num_nodes > 1:
        return f"resume on each of {run.num_nodes} nodes, with the name of one of them as FIRST_NODE: {command}"
    return f"resume: {command}"


def _row(checkpoint: SavedCheckpoint, run: RunSummary) -> tuple[str, ...]:
    """Return the columns of a checkpoint, in the order of `_HEADER`."""
    if checkpoint.is_external:
        marks = ["another program's"]
    elif checkpoint.problem is not None:
        marks = [f"damaged: {checkpoint.problem}"]
    else:
        marks = ["good"]
    if run.good and checkpoint is run.good[-1]:
        marks.append("newest")
    if checkpoint is run.best:
        marks.append("best")
    return (
        str(checkpoint.step),
        "+".join(checkpoint.reasons) or "-",
        _format_loss(checkpoint.train_loss),
        _format_loss(checkpoint.eval_loss),
        format_bytes(checkpoint.num_bytes),
        _age(checkpoint),
        ", ".join(marks),
    )


def _align(rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...]) -> list[str]:
    """Return the rows as lines with aligned columns; `right` holds the columns that are aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _format_loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _age(checkpoint: SavedCheckpoint) -> str:
    return format_age(time.time() - checkpoint.saved_at)


if __name__ == "__main__":
    sys.exit(main())
