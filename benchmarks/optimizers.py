"""Steps that AdamW, Muon and K-FAC with AdamW need to reach a loss.

    python -m benchmarks.optimizers --text FILE --setting NAME --json OUT

All runs use the trainer and the same text: the first nine tenths for training, the rest for validation, all of it at
every evaluation. For each variant, every learning rate of one grid is tried with seed 0, one option after the other,
each with the best values of the options before it. The two best values of the last option are run with the other seeds,
1, 2, 3, ...; the one with the lower mean is the variant's best, and the figures are those of these seeds.

The keys of the result:

final_loss          mean over these seeds of the last evaluation's loss
steps_to_adamw      steps until the loss reaches the mean final loss of AdamW's seeds, interpolated linearly between two
                    evaluations; the mean over the seeds, as a share of AdamW's steps; null if a seed never reaches it
cpu_to_adamw        CPU seconds until then, divided by the CPU seconds of AdamW's whole run
cpu_by_adamw        CPU seconds of a step, divided by AdamW's; of the training only, without evaluations

A variant that is `short` has three quarters of the steps, and a schedule that ends with them. A run that is already in
--json is not repeated, so that a measurement can be stopped and continued, extended by seeds, or drawn again.
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

OptionValues = Mapping[str, str]
"""Option name -> value; the value true is a flag without a value."""


@dataclass(frozen=True)
class Variant:
    """How to train: options with fixed values, and options whose values are tried.

    Attributes:
        options: name -> value.
        tried: name -> values to try, one option after the other, each with the best values of those before it; None:
            the learning rates of the setting.
        like: the variant whose best options are used; then nothing is tried.
        share: share of the setting's steps.
    """

    options: OptionValues = field(default_factory=dict)
    tried: Mapping[str, tuple[float, ...] | None] = field(default_factory=lambda: {"learning_rate": None})
    like: str | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Setting:
    """The model, the data and the length of the runs.

    Attributes:
        options: option name -> value, for all variants.
        num_updates: steps of a full run.
        num_evaluations: evaluations of a run, evenly spaced; runs with seed 0 have only the last one.
        rates: learning rates to try, the same for all variants.
    """

    options: OptionValues
    num_updates: int
    num_evaluations: int
    rates: tuple[float, ...] = (2.5e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2)


_CHARACTERS = {
    "validation_split_percentage": "10", "block_size": "64", "tokenizer_name": "char", "model_type": "gpt2",
    "dropout": "0", "weight_decay": "0.1", "adam_beta2": "0.99",
    "lr_scheduler_type": "cosine", "num_warmup_steps": "30",
}  # fmt: skip
VARIANTS = {
    _ADAMW: Variant(),
    "kfac 1/10": Variant({**_KFAC, "kfac_factor_update_steps": "1"}),
    "muon": Variant({"optim": "muon"}, {"muon_learning_rate": (0.01, 0.02, 0.04, 0.08), "learning_rate": None}),
    "kfac 1/10, short": Variant({**_KFAC, "kfac_factor_update_steps": "1"}, like="kfac 1/10", share=0.75),
    "kfac 10/10": Variant({**_KFAC, "kfac_factor_update_steps": "10"}, like="kfac 1/10"),
    "kfac 10/10, inverse": Variant({**_KFAC, "kfac_factor_update_steps": "10", "kfac_method": "inverse"}),
    "kfac 1/10, damping 0.03": Variant(
        {**_KFAC, "kfac_factor_update_steps": "1", "kfac_damping": "0.03"}, like="kfac 1/10"
    ),
    "kfac 10/10, spread": Variant({**_KFAC, "kfac_factor_update_steps": "10", "kfac_spread": "true"}, like="kfac 1/10"),
}
SETTINGS = {
    "2x64": Setting(
        {
            **_CHARACTERS, "config_overrides": "n_layer=2,n_head=4,n_embd=64,n_positions=64",
            "per_device_train_batch_size": "32",
        },
        num_updates=300, num_evaluations=6,
    ),
    # The model and the batch size of nanoGPT's documented run on a CPU.
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
    """Make the missing runs, print and write the table, and draw the curves."""
    options = _parser().parse_args()
    runs = Runs(options.json, options.text, SETTINGS[options.setting], options.setting)
    best: dict[str, OptionValues] = {}
    for name in options.variants:
        best[name] = runs.best(name, options.seeds)
    for seed in range(1, options.seeds + 1):
        for name in options.variants:
            runs.curve(name, best[name], seed)
    runs.result |= {"seeds": options.seeds, "ways": summary(runs, best, options.seeds)}
    runs.result["machine"] = describe_machine("torch", "transformers")
    runs.write()
    print("\n".join(table(runs.result)))
    if options.picture is not None:
        draw({name: runs.curves(name, best[name], options.seeds) for name in options.variants}, options.picture)
    print(f"written to {options.json}")


class Runs:
    """The runs of a setting, which are made when they are first needed and stored in a file.

    Args:
        path: the JSON file; it is read if it exists.
        text: the file to train on.
        setting: of the runs.
        name: of the setting.
    """

    def __init__(self, path: Path, text: Path, setting: Setting, name: str) -> None:
        self.setting = setting
        self._path = path
        self._text = text
        self.result: dict[str, Any] = {
            "command": f"python -m benchmarks.optimizers --text FILE --setting {name}",
            "setting": {**setting.options, "num_updates": setting.num_updates},
            "runs": [],
        }
        if path.exists():
            previous = json.loads(path.read_text())
            if previous["setting"] != self.result["setting"]:
                raise SystemExit(f"--json {path} has runs of another setting; move the file away, or name another one")
            self.result["runs"] = previous["runs"]

    def best(self, name: str, seeds: int) -> dict[str, str]:
        """Return the tried options of a variant with the values that reach the lowest loss.

        A learning rate that is best with seed 0 may diverge with another seed. So the two best values of the last
        option are run with all seeds, and the lower mean decides.
        """
        variant = VARIANTS[name]
        if variant.like is not None:
            return self.best(variant.like, seeds)
        options = {option: values or self.setting.rates for option, values in variant.tried.items()}
        best = {option: f"{values[len(values) // 2]:g}" for option, values in options.items()}
        for option, values in options.items():
            tried = [{**best, option: f"{value:g}"} for value in values]
            tried.sort(key=lambda chosen: self.curve(name, chosen, 0)[-1]["eval_loss"])
            best = tried[0]
        return min(tried[:2], key=lambda chosen: mean_end(self.curves(name, chosen, seeds)))

    def curves(self, name: str, chosen: OptionValues, seeds: int) -> list[list[Point]]:
        """Return the curves of all seeds except 0, which only selects options."""
        return [self.curve(name, chosen, seed) for seed in range(1, seeds + 1)]

    def curve(self, name: str, chosen: OptionValues, seed: int) -> list[Point]:
        """Return the curve of one run, which is made if it is missing."""
        variant = VARIANTS[name]
        setting = self.setting
        num_updates = round(variant.share * setting.num_updates)
        options = {**variant.options, **chosen, "seed": str(seed), "max_train_steps": str(num_updates)}
        for run in self.result["runs"]:
            if run["options"] == options:
                return list(run["curve"])
        eval_steps = num_updates // setting.num_evaluations if seed else num_updates
        all_options = {
            **setting.options,
            **options,
            "train_file": str(self._text),
            "eval_steps": str(eval_steps),
            "use_cpu": "true",
            "per_device_eval_batch_size": "64",
            "save_minutes": "0",
            "logging_steps": "1000",
            "torch_compile": "false",
        }
        curve = record(_command_line(all_options))
        self.result["runs"].append({"options": options, "curve": curve})
        self.write()
        last = curve[-1]
        text = f"{name} {_format_options(chosen)} seed {seed}"
        print(f"{text}: {last['eval_loss']:.4f}, CPU {last['cpu_seconds']:.1f} s", flush=True)
        return curve

    def write(self) -> None:
        """Write the runs, and the summary if there is one, to the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.result, indent=1) + "\n")


def summary(runs: Runs, best: Mapping[str, OptionValues], seeds: int) -> dict[str, Any]:
    """Return for every variant its options, its final losses, and the steps and CPU seconds to AdamW's final loss.

    Args:
        runs: of all variants.
        best: variant -> its best options.
        seeds: number of seeds, without seed 0.
    """
    curves = {name: runs.curves(name, chosen, seeds) for name, chosen in best.items()}
    goal = mean_end(curves[_ADAMW])
    cpu = statistics.fmean(curve[-1]["cpu_seconds"] for curve in curves[_ADAMW])
    steps = runs.setting.num_updates
    rows = {}
    for name, seed_curves in curves.items():
        losses = [curve[-1]["eval_loss"] for curve in seed_curves]
        arrivals = [arrival(curve, goal) for curve in seed_curves]
        step_seconds = [curve[-1]["cpu_seconds"] / curve[-1]["step"] for curve in seed_curves]
        rows[name] = {
            "options": dict(best[name]),
            "num_updates": seed_curves[0][-1]["step"],
            "final_loss": statistics.fmean(losses),
            "final_losses": losses,
            "standard_deviation": statistics.stdev(losses) if len(losses) > 1 else None,
            "steps_to_adamw": _mean_share(arrivals, "step", steps),
            "cpu_to_adamw": _mean_share(arrivals, "cpu_seconds", cpu),
            "cpu_by_adamw": statistics.fmean(step_seconds) / (cpu / steps),
        }
    # AdamW reaches the mean of its own seeds at its end by definition, although about half of the seeds do not.
    rows[_ADAMW] |= {"steps_to_adamw": 1.0, "cpu_to_adamw": 1.0}
    return rows


def mean_end(curves: list[list[Point]]) -> float:
    """Return the mean of the curves' last losses, in nats a token."""
    return statistics.fmean(curve[-1]["eval_loss"] for curve in curves)


def arrival(curve: list[Point], loss: float) -> dict[str, float] | None:
    """Return step and CPU seconds at which the loss is first reached; None if it never is.

    Between two evaluations the curve is taken as a straight line.
    """
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
    """Return the lines of a Markdown table of the result."""
    lines = [
        f"| variant | best options | steps | loss, {result['seeds']} seeds | steps to AdamW's end | CPU to it |"
        " CPU per step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["ways"].items():
        deviation = "" if row["standard_deviation"] is None else f" ± {row['standard_deviation']:.3f}"
        lines.append(
            f"| {name} | {_format_options(row['options'])} | {row['num_updates']} |"
            f" {row['final_loss']:.3f}{deviation} | {_format_share(row['steps_to_adamw'])} |"
            f" {_format_share(row['cpu_to_adamw'])} | {row['cpu_by_adamw']:.2f}x |"
        )
    return lines


def _mean_share(arrivals: list[dict[str, float] | None], key: str, total: float) -> float | None:
    """Return the mean of that key as a share of the total; None if a curve does not reach the loss."""
    points = [point for point in arrivals if point is not None]
    if len(points) < len(arrivals):
        return None
    return statistics.fmean(point[key] for point in points) / total


def _format_share(share: float | None) -> str:
    return "not reached" if share is None else f"{share:.2f}x"


def _format_options(options: OptionValues) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _command_line(options: OptionValues) -> list[str]:
    """Return the words of a command line; an option with the value true is a flag without a value."""
    words = []
    for name, value in options.items():
        words.append(f"--{name}")
        if value != "true":
            words.append(value)
    return words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, required=True, help="file to train on, as tinyshakespeare")
    parser.add_argument("--setting", choices=SETTINGS, default="2x64")
    parser.add_argument(
        "--seeds", type=int, default=5, help="number of seeds; seed 0, which selects options, is not one of them"
    )
    parser.add_argument(
        "--variants",
        type=lambda names: names.split(";"),
        default=list(VARIANTS),
        help=f"separated by semicolons, from: {'; '.join(VARIANTS)} (default: all)",
    )
    parser.add_argument("--json", type=Path, required=True, help="file of the result and of all runs so far")
    parser.add_argument("--picture", type=Path, help="PNG of the losses over steps and CPU seconds to write")
    return parser


if __name__ == "__main__":
    main()
