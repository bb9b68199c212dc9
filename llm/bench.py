"""``python -m llm.bench``: measure the speed of a training step on this machine, and where its time goes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

from llm.config.exit_codes import run_command
from llm.config.option import OptionGroup, option
from llm.config.options import Options
from llm.config.reader import read_options


class BenchGroup(OptionGroup):
    """Measurements to make, and the file for the results."""

    num_updates: int = option(20, "number of steps that are timed, after some that are not", ge=2, metavar="N")
    sweep: Literal["micro_batch"] | None = option(
        None, "micro_batch: try --per_device_train_batch_size 1, 2, 4, ... and report which is fastest"
    )
    profile: str | None = option(
        None,
        "write a trace of three steps to this file (for ui.perfetto.dev) and print what took longest",
        metavar="FILE",
    )
    json_file: str | None = option(None, "write the results to this file", metavar="FILE")


class BenchOptions(Options):
    """The options of the trainer, and those of the benchmark."""

    bench: BenchGroup = BenchGroup()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code.

    Args:
        argv: the command line without the program's name; `sys.argv[1:]` when None.
    """
    return run_command(lambda: _bench(sys.argv[1:] if argv is None else argv))


def _bench(argv: Sequence[str]) -> int:
    options = read_options(
        BenchOptions,
        argv,
        prog="python -m llm.bench",
        description="Measure the training step of the run that the trainer's options describe, on random tokens unless"
        " they name a text.",
    )
    # Imported after the options are read: --help and mistakes must not wait for torch.
    from llm.training.profiling.benchmark import bench

    bench(
        options,
        num_updates=options.bench.num_updates,
        sweep=options.bench.sweep,
        profile=options.bench.profile,
        json_file=options.bench.json_file,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
