"""The options of ``python -m llm.runs``."""

from __future__ import annotations

from llm.config.option import OptionGroup, option


class RunsOptions(OptionGroup):
    """The checkpoints of runs, and how their last starts ended."""

    runs: tuple[str, ...] = option(
        (".",), "folders of runs, or folders that hold runs (default: this one)", positional=True, metavar="OUTPUT_DIR"
    )
    verify: bool = option(False, "read every byte of every checkpoint; exit code 1 if one is damaged")
