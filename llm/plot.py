"""``python -m llm.plot``: draw the curves of one or more runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llm.config.errors import UsageError, UserError
from llm.config.exit_codes import run_command
from llm.config.option import OptionGroup, option
from llm.config.reader import read_options
from llm.training.run_dir.layout import CURVES, METRICS

_FORMATS = (".png", ".pdf", ".svg")


class PlotOptions(OptionGroup):
    """The options of ``python -m llm.plot``."""

    runs: tuple[str, ...] = option(..., "folders of runs, or their metrics.jsonl", positional=True, metavar="RUN")
    output: str = option(CURVES, "picture to write: .png, .pdf or .svg", metavar="FILE")
    x: Literal["step", "tokens"] = option("step", "quantity on the x axis")
    smoothing: int | None = option(
        None, "number of records over which the training loss is averaged (default: one in 50)", ge=1, metavar="N"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture and return the exit code.

    Args:
        argv: the command line without the program's name; `sys.argv[1:]` when None.
    """
    return run_command(lambda: _plot(sys.argv[1:] if argv is None else argv))


def metrics_by_name(runs: Sequence[str]) -> dict[str, Path]:
    """Return the metrics.jsonl of each run by the name of its folder, or by its path where names repeat.

    Raises:
        UserError: a run has no metrics.jsonl.
    """
    paths = [Path(run) / METRICS if Path(run).is_dir() else Path(run) for run in runs]
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
        description="Draw the losses and the learning rate of one or more runs.",
    )
    if Path(options.output).suffix.lower() not in _FORMATS:
        raise UsageError(f"--output {options.output}: must end in {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}")
    metrics = metrics_by_name(options.runs)

    from llm.report.curves import draw_curves

    draw_curves(metrics, Path(options.output), x=options.x, smoothing=options.smoothing)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
