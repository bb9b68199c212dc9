"""``python -m llm.bench``: how fast a run's update is on this machine, and where its time goes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llm.config.bench import BenchOptions
from llm.config.exit_codes import run_command
from llm.config.reader import read_options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and returns the exit code."""
    return run_command(lambda: _bench(sys.argv[1:] if argv is None else argv))


def _bench(argv: Sequence[str]) -> int:
    options = read_options(
        BenchOptions,
        argv,
        prog="python -m llm.bench",
        description="Measures the update of the run that the trainer's options describe, on random tokens unless"
        " they name a text.",
    )
    # Imported after the options are read, so that --help and mistakes cost no import of torch.
    from llm.training.profiling.benchmark import bench

    bench(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
