"""Steps to a loss by AdamW, Muon and K-FAC before AdamW: `python -m benchmarks.optimizers --text FILE --setting NAME`.

Every run is the trainer's, on the same text: the first nine tenths of it to train on, the rest to validate, all of that
at every evaluation. Of each way every rate of one grid is tried with the seed 0 (one option after the other,
each at the best of those before it). The two best of the last option are run with the other seeds, 1, 2, 3, ..., and
what has the lower mean there is the way's best; the figures are of those seeds.

final_loss          of those seeds' last evaluations, the mean
steps_to_adamw      updates until the loss is at the mean that AdamW's seeds end with, between two evaluations by a
                    straight line; the mean over the seeds, as a share of AdamW's updates; null where one never is
cpu_to_adamw        CPU seconds until then, by the CPU seconds of AdamW's whole run
cpu_by_adamw        CPU seconds of an update, by AdamW's; of the training alone, without evaluations

A way that is `short` has three quarters of the updates, and a schedule that ends with them. A run that stands in --json
is not made again, so that a measurement can be stopped, and continued, extended by seeds, or drawn again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.curves import draw
from benchmarks.machine import describe_machine
from benchmarks.recorded import Point, record

_KFAC = {"kfac": "true", "kfac_inv_update_steps": "10"}
_ADAMW = "adamw"

Words = Mapping[str, str]


@dataclass(frozen=True)
class Way:
    """How to train: options, and those that are tried, in this order, each at the best of those before it.

    Attributes:
        options: by name.
        tried: name -> values; None are the setting's rates.
        like: the way whose best options are added; nothing is tried.
        share: of the setting's updates.
    """

    options: Words = field(default_factory=dict)
    tried: Mapping[str, tuple[float, ...] | None] = field(default_factory=lambda: {"learning_rate": None})
    like: str | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        options: of all ways, by name.
        num_updates: of a whole run.
        num_evaluations: of any run, evenly spaced; where a way is chosen, only the last one.
        rates: that are tried, the same for all ways.
    """

    options: Words
    num_updates: int
    num_evaluations: int
    rates: tuple[float, ...] = (2.5e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2)


_CHARACTERS = {
    "validation_split_percentage": "10", "block_size": "64", "tokenizer_name": "char", "model_type": "gpt2",
    "dropout": "0", "weight_decay": "0.1", "adam_beta2": "0.99",
    "lr_scheduler_type": "cosine", "num_warmup_steps": "30",
}  # fmt: skip
WAYS = {
    _ADAMW: Way(),
    "kfac 1/10": Way({**_KFAC, "kfac_factor_update_steps": "1"}),
    "muon": Way({"optim": "muon"}, {"muon_learning_rate": (0.01, 0.02, 0.04, 0.08), "learning_rate": None}),
    "kfac 1/10, short": Way({**_KFAC, "kfac_factor_update_steps": "1"}, like="kfac 1/10", share=0.75),
    "kfac 10/10": Way({**_KFAC, "kfac_factor_update_steps": "10"}, like="kfac 1/10"),
    "kfac 10/10, inverse": Way({**_KFAC, "kfac_factor_update_steps": "10", "kfac_method": "inverse"}),
    "kfac 1/10, damping 0.03": Way(
        {**_KFAC, "kfac_factor_update_steps": "1", "kfac_damping": "0.03"}, like="kfac 1/10"
    ),
    "kfac 10/10, spread": Way({**_KFAC, "kfac_factor_update_steps": "10", "kfac_spread": "true"}, like="kfac 1/10"),
}
SETTINGS = {
    "2x64": Setting(
        {
            **_CHARACTERS, "config_overrides": "n_layer=2,n_head=4,n_embd=64,n_positions=64",
            "per_device_train_batch_size": "32",
        },
        num_updates=300, num_evaluations=6,
    ),
    # The model and the batches of nanoGPT's documented run on a CPU.
    "4x128": Setting(
        {
            **_CHARACTERS, "config_overrides": "n_layer=4,n_head=4,n_embd=128,n_positions=64",
            "per_device_train_batch_size": "12",
        },
        num_updates=300, num_evaluations=6,
    ),
    "4x256": Setting(
        {
            "validation_split_percentage": "10", "block_size": "128", "tokenizer_name": "train:bpe",
            "vocab_size": "2048", "model_type": "gpt2",
            "config_overrides": "n_layer=4,n_head=4,n_embd=256,n_positions=128", "dropout": "0",
            "per_device_train_batch_size": "8", "weight_decay": "0.1", "adam_beta2": "0.99",
            "lr_scheduler_type": "cosine", "num_warmup_steps": "20",
        },
        num_updates=150, num_evaluations=5, rates=(5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2),
    ),
}  # fmt: skip


def main() -> None:
    """Makes the runs that are missing, prints and writes the table, and draws it."""
    options = _parser().parse_args()
    runs = Runs(options.json, options.text, SETTINGS[options.setting], options.setting)
    found: dict[str, Any] = {}
    for name in options.ways:
        found[name] = runs.best(name, options.seeds)
    for seed in range(1, options.seeds + 1):
        for name in options.ways:
            runs.curve(name, found[name], seed)
    runs.result |= {"seeds": options.seeds, "ways": summary(runs, found, options.seeds)}
    runs.result["machine"] = describe_machine("torch", "transformers")
    runs.write()
    print("\n".join(table(runs.result)))
    if options.picture is not None:
        draw({name: runs.curves(name, found[name], options.seeds) for name in options.ways}, options.picture)
    print(f"written to {options.json}")


class Runs:
    """The runs of a setting, made when they are asked for and kept in a file."""

    def __init__(self, path: Path, text: Path, setting: Setting, name: str) -> None:
        self.setting, self._path, self._text = setting, path, text
        self.result: dict[str, Any] = {
            "command": f"python -m benchmarks.optimizers --text FILE --setting {name}",
            "setting": {**setting.options, "num_updates": setting.num_updates},
            "runs": [],
        }
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["setting"] != self.result["setting"]:
                raise SystemExit(f"{path} is of another setting; move it away, or name another with --json")
            self.result["runs"] = kept["runs"]

    def best(self, name: str, seeds: int) -> dict[str, str]:
        """The options of a way that end lowest, one after the other.

        The seed 0 alone would choose the rate that goes wrong with the next one: the two best values of the last option
        are run with all seeds, and the lower mean decides.
        """
        way = WAYS[name]
        if way.like is not None:
            return self.best(way.like, seeds)
        options = {option: values or self.setting.rates for option, values in way.tried.items()}
        best = {option: f"{values[len(values) // 2]:g}" for option, values in options.items()}
        for option, values in options.items():
            tried = [{**best, option: f"{value:g}"} for value in values]
            tried.sort(key=lambda chosen: self.curve(name, chosen, 0)[-1]["eval_loss"])
            best = tried[0]
        return min(tried[:2], key=lambda chosen: mean_end(self.curves(name, chosen, seeds)))

    def curves(self, name: str, chosen: Words, seeds: int) -> list[list[Point]]:
        """Those of all seeds but the one that chose."""
        return [self.curve(name, chosen, seed) for seed in range(1, seeds + 1)]

    def curve(self, name: str, chosen: Words, seed: int) -> list[Point]:
        """One run's, made where there is none yet."""
        way, setting = WAYS[name], self.setting
        num_updates = round(way.share * setting.num_updates)
        options = {**way.options, **chosen, "seed": str(seed), "max_train_steps": str(num_updates)}
        for run in self.result["runs"]:
            if run["options"] == options:
                return list(run["curve"])
        every = num_updates // setting.num_evaluations if seed else num_updates
        words = [
            *_words({**setting.options, **options, "train_file": str(self._text), "eval_steps": str(every)}),
            *("--use_cpu", "--per_device_eval_batch_size", "64", "--save_minutes", "0", "--logging_steps", "1000"),
            *("--torch_compile", "false"),
        ]
        curve = record(words)
        self.result["runs"].append({"options": options, "curve": curve})
        self.write()
        last = curve[-1]
        print(
            f"{name} {_said(chosen)} seed {seed}: {last['eval_loss']:.4f}, CPU {last['cpu_seconds']:.1f} s", flush=True
        )
        return curve

    def write(self) -> None:
        """Everything, and what follows from it if that is known."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.result, indent=1) + "\n")


def summary(runs: Runs, found: Mapping[str, Words], seeds: int) -> dict[str, Any]:
    """Of every way: its options, its final losses, and what it took to AdamW's."""
    curves = {name: runs.curves(name, chosen, seeds) for name, chosen in found.items()}
    goal = mean_end(curves[_ADAMW])
    cpu = statistics.fmean(curve[-1]["cpu_seconds"] for curve in curves[_ADAMW])
    steps = runs.setting.num_updates
    ways = {}
    for name, each in curves.items():
        losses = [curve[-1]["eval_loss"] for curve in each]
        reached = [arrival(curve, goal) for curve in each]
        last = [curve[-1]["cpu_seconds"] / curve[-1]["step"] for curve in each]
        ways[name] = {
            "options": dict(found[name]),
            "num_updates": each[0][-1]["step"],
            "final_loss": statistics.fmean(losses),
            "final_losses": losses,
            "standard_deviation": statistics.stdev(losses) if len(losses) > 1 else None,
            "steps_to_adamw": _mean_share(reached, "step", steps),
            "cpu_to_adamw": _mean_share(reached, "cpu_seconds", cpu),
            "cpu_by_adamw": statistics.fmean(last) / (cpu / steps),
        }
    # By its own mean it is there at its end, although half of its seeds are not.
    ways[_ADAMW] |= {"steps_to_adamw": 1.0, "cpu_to_adamw": 1.0}
    return ways


def mean_end(curves: list[list[Point]]) -> float:
    """Of the last losses."""
    return statistics.fmean(curve[-1]["eval_loss"] for curve in curves)


def arrival(curve: list[Point], loss: float) -> dict[str, float] | None:
    """Step and CPU seconds when the loss is first reached, between two evaluations on a straight line."""
    before: Point | None = None
    for point in curve:
        if point["eval_loss"] <= loss:
            if before is None:
                return {key: point[key] for key in ("step", "cpu_seconds")}
            share = (before["eval_loss"] - loss) / (before["eval_loss"] - point["eval_loss"])
            return {key: before[key] + share * (point[key] - before[key]) for key in ("step", "cpu_seconds")}
        before = point
    return None


def table(result: Mapping[str, Any]) -> list[str]:
    """A Markdown table."""
    lines = [
        f"| way | best options | updates | loss, {result['seeds']} seeds | updates to AdamW's end | CPU to it |"
        " CPU of an update |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, way in result["ways"].items():
        spread = "" if way["standard_deviation"] is None else f" ± {way['standard_deviation']:.3f}"
        lines.append(
            f"| {name} | {_said(way['options'])} | {way['num_updates']} | {way['final_loss']:.3f}{spread} |"
            f" {_times(way['steps_to_adamw'])} | {_times(way['cpu_to_adamw'])} | {way['cpu_by_adamw']:.2f}x |"
        )
    return lines


def _mean_share(reached: list[dict[str, float] | None], key: str, whole: float) -> float | None:
    points = [point for point in reached if point is not None]
    return statistics.fmean(point[key] for point in points) / whole if len(points) == len(reached) else None


def _times(share: float | None) -> str:
    return "not reached" if share is None else f"{share:.2f}x"


def _said(options: Words) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _words(options: Words) -> list[str]:
    """A command line; an option of the value true is a bare flag."""
    return [
        word for name, value in options.items() for word in ([f"--{name}"] if value == "true" else [f"--{name}", value])
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare")
    parser.add_argument("--setting", choices=SETTINGS, default="2x64")
    parser.add_argument("--seeds", type=int, default=5, help="beside the one that chooses")
    parser.add_argument(
        "--ways",
        type=lambda words: words.split(";"),
        default=list(WAYS),
        help=f"of {'; '.join(WAYS)}, with semicolons between (default: all)",
    )
    parser.add_argument("--json", type=Path, required=True, help="the result, and the runs so far")
    parser.add_argument("--picture", type=Path, help="a PNG of the losses against updates and CPU seconds")
    return parser


if __name__ == "__main__":
    main()
