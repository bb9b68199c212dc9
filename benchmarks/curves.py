"""Picture of a comparison: losses over steps, tokens and CPU seconds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.recorded import Point

# Colours that are distinguishable with any colour vision (Okabe and Ito). Source: https://jfly.uni-koeln.de/color/
_COLORS = ("#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#555555")
# The vertical axis shows this range above the lowest loss, and at least the second range above the highest final loss.
# The first steps, which are similar in all variants, are cut off.
_LOSS_RANGE = 0.45
_RANGE_ABOVE_FINAL_LOSS = 0.15


def draw(variants: Mapping[str, Sequence[Sequence[Point]]], output: Path) -> None:
    """Draw the curves and write them to a file.

    Args:
        variants: name to the curves of all seeds; a variant is drawn as the line of means in the range of its seeds.
        output: PNG file to write.
    """
    figure = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    lowest = min(point["eval_loss"] for curves in variants.values() for curve in curves for point in curve)
    highest_final = max(curve[-1]["eval_loss"] for curves in variants.values() for curve in curves)
    tokens_per_step = 1.0
    for color, (name, curves) in zip(_COLORS, variants.items(), strict=False):
        points = list(zip(*curves, strict=True))
        tokens_per_step = points[0][0]["tokens"] / points[0][0]["step"]
        losses = [[point["eval_loss"] for point in seeds] for seeds in points]
        for axes, key in ((by_steps, "step"), (by_time, "cpu_seconds")):
            x = [statistics.fmean(point[key] for point in seeds) for seeds in points]
            style = "--" if "short" in name else "-"
            axes.plot(x, [statistics.fmean(seeds) for seeds in losses], style, color=color, label=name, linewidth=1.5)
            axes.fill_between(
                x, [min(seeds) for seeds in losses], [max(seeds) for seeds in losses], color=color, alpha=0.15
            )
    by_steps.set_ylim(lowest - 0.02, max(lowest + _LOSS_RANGE, highest_final + _RANGE_ABOVE_FINAL_LOSS))
    by_steps.set_ylabel("validation loss (nats per token)")
    by_steps.set_xlabel("steps")
    by_time.set_xlabel("CPU seconds of training")
    top = by_steps.secondary_xaxis(
        "top", functions=(lambda step: step * tokens_per_step / 1e3, lambda tokens: tokens * 1e3 / tokens_per_step)
    )
    top.set_xlabel("thousand tokens")
    by_steps.legend(frameon=False, fontsize=8)
    for axes in (by_steps, by_time):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
