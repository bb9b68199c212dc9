"""The options of ``python -m llm.plot``."""

from __future__ import annotations

from typing import Literal

from llm.config.option import Group, row


class PlotOptions(Group):
    """Curves of one or more runs."""

    runs: tuple[str, ...] = row(..., "folders of runs, or their metrics.jsonl", positional=True, metavar="RUN")
    output: str = row("curves.png", "picture that is written: .png, .pdf or .svg", metavar="FILE")
    x: Literal["step", "tokens"] = row("step", "what the curves are drawn over")
    smoothing: int | None = row(
        None,
        "records that the training loss is averaged over (default: one in 50)",
        ge=1,
        metavar="N",
    )
