"""Complete runs with different arithmetic: `python -m benchmarks.arithmetic --text FILE --json OUT`.

Runs examples/shakespeare_char_cpu.toml to its end with several seeds, in variants that should differ by rounding only:

eager      fp32, loss from whole logits: the reference
compiled   --torch_compile true
chunked    the chunked loss, which the trainer does not use for so small a vocabulary
bf16       --mixed_precision bf16; by default only if the device multiplies bf16 natively

eval_loss        loss of the whole validation text, by variant and seed
difference       mean difference between the losses of a variant and of eager with the same seeds; the program exits
                 with 1 if it exceeds --tolerance
spread           largest minus smallest loss of eager: the effect of another seed

A run that --json already contains is not repeated, so a measurement can be stopped, continued and extended.
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
"""variant -> seed -> loss of the evaluation."""

VARIANTS = {
    _EAGER: ("--torch_compile", "false", "--mixed_precision", "no"),
    "compiled": ("--torch_compile", "true", "--mixed_precision", "no"),
    "chunked": ("--torch_compile", "false", "--mixed_precision", "no"),
    "bf16": ("--torch_compile", "false", "--mixed_precision", "bf16"),
}


def main() -> None:
    """Measure, print and write the result; with `--variant`, run one of the measured runs."""
    options, trainer_args = _parser().parse_known_args()
    if options.variant is not None:
        sys.exit(_train(options.variant, trainer_args))
    if trainer_args:
        sys.exit(f"{' '.join(trainer_args)}: unknown option; --help lists the options")
    if options.text is None or not options.text.is_file():
        sys.exit(f"--text {options.text}: no such file; give a text such as tinyshakespeare")
    variants = [_EAGER, *(name for name in options.variants or _native_variants() if name != _EAGER)]
    result = _previous_result(options)
    losses: Losses = result["eval_loss"]
    with tempfile.TemporaryDirectory() as name:
        for seed in range(1, options.seeds + 1):
            for variant in variants:
                loss_by_seed = losses.setdefault(variant, {})
                if str(seed) not in loss_by_seed:
                    loss = _run_loss(options, variant, seed, Path(name) / f"{variant}_{seed}")
                    loss_by_seed[str(seed)] = loss
                    print(f"seed {seed}, {variant}: eval_loss {loss:.5f}", flush=True)
                    result |= {**summary(losses), "machine": describe_machine("torch", "transformers", "numpy")}
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps(result, indent=1) + "\n")
    result |= summary(losses)
    for variant, difference in result["difference"].items():
        print(f"{variant:<10} {difference:+.5f} from eager, mean over {len(losses[variant])} seeds")
    print(f"spread of eager: {result['spread']:.5f}; written to {options.json}")
    if outliers := beyond_tolerance(result, options.tolerance):
        sys.exit(f"mean loss differs from eager by more than {options.tolerance}: {', '.join(outliers)}")


def _previous_result(options: argparse.Namespace) -> dict[str, Any]:
    """Contents of --json, or an empty result if there is no such file."""
    example = EXAMPLE.read_text()
    empty: dict[str, Any] = {"example": example, "updates": options.num_updates, "eval_loss": {}}
    if not options.json.exists():
        return empty
    previous: dict[str, Any] = json.loads(options.json.read_text())
    # The comments of the example may differ.
    is_same_example = tomllib.loads(previous.get("example", "")) == tomllib.loads(example)
    if not is_same_example or previous.get("updates") != empty["updates"]:
        sys.exit(f"{options.json} contains other runs; move it, or give another file with --json")
    return previous


def summary(losses: Losses) -> dict[str, Any]:
    """Return the mean difference of each variant from eager, and the spread of the losses of eager."""
    eager = losses[_EAGER]
    differences = {
        variant: [loss - eager[seed] for seed, loss in loss_by_seed.items()] for variant, loss_by_seed in losses.items()
    }
    return {
        "difference": {name: statistics.fmean(values) for name, values in differences.items() if name != _EAGER},
        "spread": max(eager.values()) - min(eager.values()),
    }


def beyond_tolerance(result: dict[str, Any], tolerance: float) -> list[str]:
    """Return the variants whose mean loss differs from eager by more than `tolerance` nats."""
    return [variant for variant, value in result["difference"].items() if abs(value) > tolerance]


def _native_variants() -> list[str]:
    """Variants whose arithmetic the device computes natively."""
    import torch

    from llm.system.precision import multiplies_bf16

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    return [variant for variant in VARIANTS if variant != "bf16" or multiplies_bf16(device)]


def _run_loss(options: argparse.Namespace, variant: str, seed: int, output_dir: Path) -> float:
    """Loss of the last evaluation of one run."""
    args = ["--config", str(EXAMPLE), "--train_file", str(options.text.resolve()), *VARIANTS[variant]]
    args += ["--seed", str(seed), "--save_minutes", "0", "--output_dir", str(output_dir)]
    if options.num_updates:
        args += ["--max_train_steps", str(options.num_updates)]
    environment = {} if options.threads is None else thread_environment(options.threads, "cpu")
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.arithmetic", "--variant", variant, *args],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if process.returncode:
        sys.exit(f"{variant}, seed {seed}: exit code {process.returncode}:\n{process.stderr[-2000:]}")
    return float(json.loads((output_dir / "all_results.json").read_text())["eval_loss"])


def _train(variant: str, args: list[str]) -> int:
    """Run the trainer; for `chunked` with the chunked loss for every vocabulary."""
    from llm.models import language_model
    from llm.trainers.gpt import main as trainer

    if variant == "chunked":
        language_model.chunking_is_faster = lambda vocab_size, min_vocab_size=0: True
    return trainer(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.arithmetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the trainer's --seed is not --seeds
    )
    parser.add_argument("--text", type=Path, help="text to train on, such as tinyshakespeare")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/arithmetic.json"), help="file of the result"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds, that is runs of each variant (default: 3)")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, help="default: those that the device computes natively"
    )
    parser.add_argument("--num_updates", type=int, help="steps of each run (default: that of the example)")
    parser.add_argument("--threads", type=int, help="threads of each run (default: the choice of the trainer)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="difference in nats (default: 0.01)")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
