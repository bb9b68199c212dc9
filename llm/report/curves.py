"""The picture of a run, or of several compared: losses and learning rate over the steps."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llm.config.errors import UserError
from llm.files.atomic import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]

# Colours that people with any colour vision tell apart (Okabe and Ito), without the yellow.
# Source: https://jfly.uni-koeln.de/color/
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
_EVALUATION_COLOR = "#D55E00"
_INK = "#333333"


@dataclass
class _Records:
    """The records of one run, each kind with ascending steps."""

    training: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)


def draw_curves(
    runs: Mapping[str, Path],
    picture: Path,
    *,
    x: Literal["step", "tokens"] = "step",
    smoothing: int | None = None,
) -> None:
    """Writes a PNG: training loss (raw and smoothed) with evaluations above, learning rate below.

    Args:
        runs: for each name in the legend the metrics.jsonl of that run; a line cut short by a crash
            is passed over, and of steps that were done twice the later ones count.
        picture: file that is written, its folder too where it is missing.
        x: what the horizontal axis counts: updates, or training tokens.
        smoothing: span of the moving average in records; one in fifty of a run's records when None.

    Raises:
        UserError: matplotlib is missing, a file is missing or has no records, or the picture cannot
            be written.
    """
    records = {name: _read_records(path) for name, path in runs.items()}
    if x == "tokens":
        for name, path in runs.items():
            if not all("tokens" in record for record in records[name].training):
                raise UserError(f"{path} counts no tokens: leave out --x tokens")
    figure = _new_figure()
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for index, (name, run) in enumerate(records.items()):
        color = _COLORS[index % len(_COLORS)]
        place = _places(run, x)
        label = name if len(records) > 1 else None
        _draw_losses(losses, run, place, smoothing, color, label)
        if series := _series(run.training, "lr"):
            rates.plot(place(series[0]), series[1], color=color, linewidth=1.6)
    _dress(losses, rates, title=next(iter(records)) if len(records) == 1 else "", x=x)
    figure.align_ylabels()
    _save(figure, picture)


def _read_records(path: Path) -> _Records:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run writes it from its first record on") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    records = _Records()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            if line.strip() and number < len(lines):  # a torn last line is what a kill leaves
                log.warning("%s: line %d is no record and is passed over", path, number)
            continue
        if "eval_loss" in record:
            kind = records.evaluation
        elif "loss" in record:
            kind = records.training
        else:  # samples and other notes
            continue
        # A resumed run repeats the steps after its checkpoint: what came before is no more.
        while kind and kind[-1]["step"] >= step:
            kind.pop()
        kind.append(record)
    if not records.training and not records.evaluation:
        raise UserError(f"{path} holds no records yet")
    return records


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[Floats, Floats] | None:
    """Steps and finite values of a key, float64 [n] each; None where no record has it."""
    pairs = [
        (record["step"], record[key])
        for record in records
        if isinstance(record.get(key), int | float) and math.isfinite(record[key])
    ]
    if not pairs:
        return None
    steps, values = zip(*pairs, strict=True)
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def _places(run: _Records, x: Literal["step", "tokens"]) -> Callable[[Floats], Floats]:
    """Where a step lies on the horizontal axis; evaluations carry no tokens of their own."""
    tokens = _series(run.training, "tokens") if x == "tokens" else None
    if tokens is None:
        return lambda steps: steps
    known_steps, known_tokens = tokens
    return lambda steps: np.interp(steps, known_steps, known_tokens)


def _smoothed(values: Floats, span: int) -> Floats:
    """Exponential moving average with the weight of `span` records, unbiased from the first on."""
    decay = 1 - 2 / (span + 1)
    smooth = np.empty_like(values)
    total = weight = 0.0
    for index, value in enumerate(values):
        total = decay * total + value
        weight = decay * weight + 1
        smooth[index] = total / weight
    return smooth


def _draw_losses(
    axes: Axes,
    run: _Records,
    place: Callable[[Floats], Floats],
    smoothing: int | None,
    color: str,
    label: str | None,
) -> None:
    """One run's losses; `label` is its name among several, None where it is the only one."""
    if series := _series(run.training, "loss"):
        steps, values = series
        smooth = _smoothed(values, smoothing or max(1, len(values) // 50))
        axes.plot(place(steps), values, color=color, alpha=0.25, linewidth=0.9)
        axes.plot(place(steps), smooth, color=color, linewidth=1.8, label=label or "training")
    if series := _series(run.evaluation, "eval_loss"):
        steps, values = series
        own = _EVALUATION_COLOR if label is None else color
        axes.plot(
            place(steps),
            values,
            color=own,
            linewidth=1.2,
            linestyle=(0, (4, 2)),
            marker="o",
            markersize=5,
            markerfacecolor="white",
            markeredgewidth=1.4,
            label=f"{f'{label}, ' if label else ''}evaluation (last {values[-1]:.3f})",
        )


def _new_figure() -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("curves need matplotlib: pip install llm-trainers[plot]") from None
    # A figure of our own, without pyplot: no window, no global state, no setting of the user's.
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _dress(losses: Axes, rates: Axes, *, title: str, x: str) -> None:
    """Axes, grid, legend and title."""
    from matplotlib.ticker import EngFormatter

    losses.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK)
    losses.set_ylabel("loss (nats per token)", color=_INK)
    rates.set_ylabel("learning rate", color=_INK)
    rates.set_xlabel("update" if x == "step" else "training tokens", color=_INK)
    rates.xaxis.set_major_formatter(EngFormatter(sep=""))
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.set_ylim(bottom=0)
    for axes in (losses, rates):
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(colors=_INK, labelsize=9)
        axes.margins(x=0.02)
    if losses.get_legend_handles_labels()[0]:
        losses.legend(frameon=False, fontsize=9, labelcolor=_INK)


def _save(figure: Figure, picture: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=picture.suffix[1:].lower())
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(picture, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{picture} cannot be written ({error.strerror})") from None
