"""The options of ``python -m llm.plot``."""

from __future__ import annotations

from typing import Literal

from llm.config.option import OptionGroup, option


class PlotOptions(OptionGroup):
    """Curves of one or more runs."""

    runs: tuple[str, ...] = option(..., "folders of runs, or their metrics.jsonl", positional=True, metavar="RUN")
    output: str = option("curves.png", "picture that is written: .png, .pdf or .svg", metavar="FILE")
    x: Literal["step", "tokens"] = option("step", "what the curves are drawn over")
    smoothing: int | None = option(
        None,
        "records that the training loss is averaged over (default: one in 50)",
        ge=1,
        metavar="N",
    )
