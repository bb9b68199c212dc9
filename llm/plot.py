"""``python -m llm.plot``: the curves of one or more runs as a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llm.config.errors import UsageError, UserError
from llm.config.exit_codes import run_command
from llm.config.plot import PlotOptions
from llm.config.reader import read_options

_KINDS = (".png", ".pdf", ".svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the picture and returns the exit code."""
    return run_command(lambda: _plot(sys.argv[1:] if argv is None else argv))


def named_metrics(runs: Sequence[str]) -> dict[str, Path]:
    """The metrics.jsonl of each run by its folder's name, or its path where that is not unique.

    Raises:
        UserError: there is none.
    """
    paths = [Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run) for run in runs]
    for run, path in zip(runs, paths, strict=True):
        if not path.is_file():
            raise UserError(f"{run}: no metrics.jsonl there; give a run's --output_dir")
    names = [path.resolve().parent.name for path in paths]
    return {name if names.count(name) == 1 else str(path.parent): path for name, path in zip(names, paths, strict=True)}


def _plot(argv: Sequence[str]) -> int:
    options = read_options(
        PlotOptions,
        argv,
        prog="python -m llm.plot",
        description="Draws the losses and the learning rate of one or more runs.",
    )
    if Path(options.output).suffix.lower() not in _KINDS:
        raise UsageError(f"--output {options.output}: must end in {', '.join(_KINDS[:-1])} or {_KINDS[-1]}")
    metrics = named_metrics(options.runs)

    from llm.report.curves import draw_curves

    draw_curves(metrics, Path(options.output), x=options.x, smoothing=options.smoothing)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
