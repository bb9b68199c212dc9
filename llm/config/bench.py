"""The options of ``python -m llm.bench``: the trainer's, and a table of its own."""

from __future__ import annotations

from typing import Literal

from llm.config.option import OptionGroup, option
from llm.config.options import Options

# One row a line, however long: the table is read down its columns.
# fmt: off


class BenchGroup(OptionGroup):
    """What is measured."""

    num_updates: int = option(20, "updates that are timed; some before them are not", ge=2, metavar="N")
    sweep: Literal["micro_batch"] | None = option(None, "micro_batch: try --per_device_train_batch_size 1, 2, 4, ... and say which is fastest")
    profile: str | None = option(None, "write a trace of three updates there (for ui.perfetto.dev) and print what took longest", metavar="FILE")
    json_file: str | None = option(None, "write the figures there", metavar="FILE")


class BenchOptions(Options):
    """The options of ``python -m llm.bench``."""

    bench: BenchGroup = BenchGroup()
