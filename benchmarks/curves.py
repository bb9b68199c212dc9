"""The picture of a comparison: losses against updates, tokens, and CPU seconds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.recorded import Point

# Of Okabe and Ito, which people with any colour vision tell apart. Source: https://jfly.uni-koeln.de/color/
_COLORS = ("#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#555555")
# Of all losses the lowest and this much are shown, and more where a way ends higher: the first updates are alike.
_SHOWN = 0.45
_ABOVE_AN_END = 0.15


def draw(ways: Mapping[str, Sequence[Sequence[Point]]], picture: Path) -> None:
    """Writes a PNG.

    Args:
        ways: by name the curves of its seeds; each way is a line of means within the range of its seeds.
        picture: file that is written.
    """
    figure = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    by_updates, by_time = figure.subplots(1, 2, sharey=True)
    lowest = min(point["eval_loss"] for curves in ways.values() for curve in curves for point in curve)
    highest_end = max(curve[-1]["eval_loss"] for curves in ways.values() for curve in curves)
    tokens_a_step = 1.0
    for color, (name, curves) in zip(_COLORS, ways.items(), strict=False):
        points = list(zip(*curves, strict=True))
        tokens_a_step = points[0][0]["tokens"] / points[0][0]["step"]
        losses = [[point["eval_loss"] for point in seeds] for seeds in points]
        for axes, key in ((by_updates, "step"), (by_time, "cpu_seconds")):
            places = [statistics.fmean(point[key] for point in seeds) for seeds in points]
            style = "--" if "short" in name else "-"
            axes.plot(
                places, [statistics.fmean(each) for each in losses], style, color=color, label=name, linewidth=1.5
            )
            axes.fill_between(places, [min(e) for e in losses], [max(e) for e in losses], color=color, alpha=0.15)
    by_updates.set_ylim(lowest - 0.02, max(lowest + _SHOWN, highest_end + _ABOVE_AN_END))
    by_updates.set_ylabel("validation loss (nats a token)")
    by_updates.set_xlabel("updates")
    by_time.set_xlabel("CPU seconds of training")
    top = by_updates.secondary_xaxis(
        "top", functions=(lambda x: x * tokens_a_step / 1e3, lambda x: x * 1e3 / tokens_a_step)
    )
    top.set_xlabel("thousand tokens")
    by_updates.legend(frameon=False, fontsize=8)
    for axes in (by_updates, by_time):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
