"""Whole runs in other arithmetic: `python -m benchmarks.arithmetic --text FILE --json OUT`.

examples/shakespeare_char_cpu.toml to its end, with several seeds, in several ways that should differ by rounding alone:

eager      fp32, the loss from whole logits: what the others are held against
compiled   --torch_compile true
chunked    the loss by chunks of rows, which this vocabulary is too small for by itself
bf16       --mixed_precision bf16; left out where the device does not multiply it natively, unless it is named

eval_loss        by seed, over the whole validation text
difference       of a way's losses and eager's with the same seeds, the mean: within --tolerance, or the program exits
                 with 1
spread           of eager's losses, from the smallest to the largest: what another seed does

A run that stands in --json is not made again, so that a measurement can be stopped and continued, or extended.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.gate import thread_environment
from benchmarks.machine import describe_machine

EXAMPLE = Path("examples/shakespeare_char_cpu.toml")
_EAGER = "eager"

Losses = dict[str, dict[str, float]]
"""way -> seed -> evaluation's loss."""

WAYS = {
    _EAGER: ("--torch_compile", "false", "--mixed_precision", "no"),
    "compiled": ("--torch_compile", "true", "--mixed_precision", "no"),
    "chunked": ("--torch_compile", "false", "--mixed_precision", "no"),
    "bf16": ("--torch_compile", "false", "--mixed_precision", "bf16"),
}


def main() -> None:
    """Measures, prints and writes the result; with `--way`, is one of the measured runs."""
    options, words = _parser().parse_known_args()
    if options.way is not None:
        sys.exit(_train(options.way, words))
    if words:
        sys.exit(f"{' '.join(words)}: no option of this benchmark")
    if options.text is None or not options.text.is_file():
        sys.exit(f"--text {options.text}: no such file; give tinyshakespeare or the like")
    ways = [_EAGER, *(way for way in options.ways or _native_ways() if way != _EAGER)]
    result = _kept(options)
    losses: Losses = result["eval_loss"]
    with tempfile.TemporaryDirectory() as name:
        for seed in range(1, options.seeds + 1):
            for way in ways:
                found = losses.setdefault(way, {})
                if str(seed) not in found:
                    found[str(seed)] = _loss(options, way, seed, Path(name) / f"{way}_{seed}")
                    print(f"seed {seed}, {way}: eval_loss {found[str(seed)]:.5f}", flush=True)
                    result |= {**summary(losses), "machine": describe_machine("torch", "transformers", "numpy")}
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps(result, indent=1) + "\n")
    result |= summary(losses)
    for way, difference in result["difference"].items():
        print(f"{way:<10} {difference:+.5f} from eager, the mean of {len(losses[way])} seeds")
    print(f"spread of eager's: {result['spread']:.5f}; in {options.json}")
    if far := too_far(result, options.tolerance):
        sys.exit(f"farther than {options.tolerance} from eager: {', '.join(far)}")


def _kept(options: argparse.Namespace) -> dict[str, Any]:
    """What the file has of the same runs."""
    example = EXAMPLE.read_text()
    new: dict[str, Any] = {"example": example, "updates": options.num_updates, "eval_loss": {}}
    if not options.json.exists():
        return new
    kept: dict[str, Any] = json.loads(options.json.read_text())
    # Comments of the example may have changed since.
    if tomllib.loads(kept.get("example", "")) != tomllib.loads(example) or kept.get("updates") != new["updates"]:
        sys.exit(f"{options.json} is of other runs; move it away, or name another with --json")
    return kept


def summary(losses: Losses) -> dict[str, Any]:
    """Mean differences from eager's, and the spread of eager's own losses."""
    eager = losses[_EAGER]
    pairs = {way: [loss - eager[seed] for seed, loss in found.items()] for way, found in losses.items()}
    return {
        "difference": {way: statistics.fmean(found) for way, found in pairs.items() if way != _EAGER},
        "spread": max(eager.values()) - min(eager.values()),
    }


def too_far(result: dict[str, Any], tolerance: float) -> list[str]:
    """The ways whose mean is farther from eager's than so many nats."""
    return [way for way, value in result["difference"].items() if abs(value) > tolerance]


def _native_ways() -> list[str]:
    import torch

    from llm.system.precision import multiplies_bf16

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    return [way for way in WAYS if way != "bf16" or multiplies_bf16(device)]


def _loss(options: argparse.Namespace, way: str, seed: int, output_dir: Path) -> float:
    """The last evaluation of one run."""
    words = ["--config", str(EXAMPLE), "--train_file", str(options.text.resolve()), *WAYS[way], "--seed", str(seed)]
    words += ["--save_minutes", "0", "--output_dir", str(output_dir)]
    words += ["--max_train_steps", str(options.num_updates)] if options.num_updates else []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.arithmetic", "--way", way, *words],
        env={**os.environ, **({} if options.threads is None else thread_environment(options.threads, "cpu"))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{way}, seed {seed}, ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return float(json.loads((output_dir / "all_results.json").read_text())["eval_loss"])


def _train(way: str, words: list[str]) -> int:
    """The trainer; for `chunked` with a loss that takes every vocabulary for a large one."""
    from llm.models import language_model
    from llm.trainers.gpt import main as trainer

    if way == "chunked":
        language_model.chunking_is_faster = lambda vocab_size, min_vocab_size=0: True
    return trainer(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.arithmetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the trainer's --seed is not --seeds
    )
    parser.add_argument("--text", type=Path, help="what to train on, such as tinyshakespeare")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/arithmetic.json"), help="the result")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every way (default: 3)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="(default: all that the device does natively)")
    parser.add_argument("--num_updates", type=int, help="(default: the example's)")
    parser.add_argument("--threads", type=int, help="of every run (default: the trainer's own choice)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="nats (default: 0.01)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
