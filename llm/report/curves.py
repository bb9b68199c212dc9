"""Curves of one or more runs as a picture: losses and learning rate over steps or tokens."""

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

# Colours that are distinguishable with any colour vision (Okabe and Ito), without the yellow.
# Source: https://jfly.uni-koeln.de/color/
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
_EVALUATION_COLOR = "#D55E00"
_TEXT_COLOR = "#333333"


@dataclass
class _Records:
    """The training and evaluation records of one run, in ascending order of steps."""

    training: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)


def draw_curves(
    runs: Mapping[str, Path],
    output: Path,
    *,
    x: Literal["step", "tokens"] = "step",
    smoothing: int | None = None,
) -> None:
    """Draw the curves of runs and write them to a file.

    The upper panel shows the training loss (raw and smoothed) and the evaluation loss, the lower one the learning rate.

    Args:
        runs: name in the legend to the metrics.jsonl of that run. A line that a crash cut short is skipped. If a
            step occurs twice, the later record is drawn.
        output: file to write (PNG, PDF or SVG, by its suffix); its folder is created if it is missing.
        x: unit of the horizontal axis: steps, or training tokens.
        smoothing: span of the moving average in records; None: a fiftieth of the records of the run.

    Raises:
        UserError: matplotlib is missing, a file is missing or has no records, or the output cannot be written.
    """
    records = {name: _read_records(path) for name, path in runs.items()}
    if x == "tokens":
        for name, path in runs.items():
            if not all("tokens" in record for record in records[name].training):
                raise UserError(f"{path}: records without a number of tokens; leave out --x tokens")
    figure = _new_figure()
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for index, (name, run) in enumerate(records.items()):
        color = _COLORS[index % len(_COLORS)]
        to_x = _x_axis(run, x)
        label = name if len(records) > 1 else None
        _draw_losses(losses, run, to_x, smoothing, color, label)
        if series := _series(run.training, "lr"):
            rates.plot(to_x(series[0]), series[1], color=color, linewidth=1.6)
    title = next(iter(records)) if len(records) == 1 else ""
    _style_axes(losses, rates, title=title, x=x)
    figure.align_ylabels()
    _save(figure, output)


def _read_records(path: Path) -> _Records:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run creates it with its first record") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    records = _Records()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            if line.strip() and number < len(lines):  # a killed run may leave an incomplete last line
                log.warning("%s: line %d is not a record; it is skipped", path, number)
            continue
        if "eval_loss" in record:
            kind = records.evaluation
        elif "loss" in record:
            kind = records.training
        else:  # samples and other records
            continue
        # A resumed run repeats the steps after its checkpoint: remove the records of the first time.
        while kind and kind[-1]["step"] >= step:
            kind.pop()
        kind.append(record)
    if not records.training and not records.evaluation:
        raise UserError(f"{path}: no records yet; wait for the first step of the run")
    return records


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[Floats, Floats] | None:
    """Steps and finite values of a key, float64 [n] each; None if no record has a finite value."""
    pairs = [
        (record["step"], record[key])
        for record in records
        if isinstance(record.get(key), int | float) and math.isfinite(record[key])
    ]
    if not pairs:
        return None
    steps, values = zip(*pairs, strict=True)
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def _x_axis(run: _Records, x: Literal["step", "tokens"]) -> Callable[[Floats], Floats]:
    """Function from steps to positions on the horizontal axis, float64 [n] each.

    Records of evaluations have no number of tokens, so tokens are interpolated between training records.
    """
    tokens = _series(run.training, "tokens") if x == "tokens" else None
    if tokens is None:
        return lambda steps: steps
    known_steps, known_tokens = tokens
    return lambda steps: np.interp(steps, known_steps, known_tokens)


def _smooth(values: Floats, span: int) -> Floats:
    """Exponential moving average with a span of `span` records and bias correction, float64 [n]."""
    decay = 1 - 2 / (span + 1)
    averages = np.empty_like(values)
    total = weight = 0.0
    for index, value in enumerate(values):
        total = decay * total + value
        weight = decay * weight + 1
        averages[index] = total / weight
    return averages


def _draw_losses(
    axes: Axes,
    run: _Records,
    to_x: Callable[[Floats], Floats],
    smoothing: int | None,
    color: str,
    label: str | None,
) -> None:
    """Draw the losses of one run; `label` is its name if there are several runs, else None."""
    if series := _series(run.training, "loss"):
        steps, values = series
        averages = _smooth(values, smoothing or max(1, len(values) // 50))
        axes.plot(to_x(steps), values, color=color, alpha=0.25, linewidth=0.9)
        axes.plot(to_x(steps), averages, color=color, linewidth=1.8, label=label or "training")
    if series := _series(run.evaluation, "eval_loss"):
        steps, values = series
        prefix = "" if label is None else f"{label}, "
        axes.plot(
            to_x(steps),
            values,
            color=_EVALUATION_COLOR if label is None else color,
            linewidth=1.2,
            linestyle=(0, (4, 2)),
            marker="o",
            markersize=5,
            markerfacecolor="white",
            markeredgewidth=1.4,
            label=f"{prefix}evaluation (last {values[-1]:.3f})",
        )


def _new_figure() -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("curves need matplotlib, which is not installed: pip install llm-trainers[plot]") from None
    # A figure without pyplot opens no window, changes no global state and ignores the settings of the user.
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style_axes(losses: Axes, rates: Axes, *, title: str, x: str) -> None:
    """Set labels, grid, legend and title."""
    from matplotlib.ticker import EngFormatter

    losses.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_TEXT_COLOR)
    losses.set_ylabel("loss (nats per token)", color=_TEXT_COLOR)
    rates.set_ylabel("learning rate", color=_TEXT_COLOR)
    rates.set_xlabel("step" if x == "step" else "training tokens", color=_TEXT_COLOR)
    rates.xaxis.set_major_formatter(EngFormatter(sep=""))
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.set_ylim(bottom=0)
    for axes in (losses, rates):
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(colors=_TEXT_COLOR, labelsize=9)
        axes.margins(x=0.02)
    if losses.get_legend_handles_labels()[0]:
        losses.legend(frameon=False, fontsize=9, labelcolor=_TEXT_COLOR)


def _save(figure: Figure, output: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=output.suffix[1:].lower())
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(output, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None
