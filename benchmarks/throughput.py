"""The update of ours and of other trainers, side by side: `python -m benchmarks.throughput --nanogpt DIR --json OUT`.

Every program (`benchmarks.programs` says what each is) lives in a process of its own and makes a few updates in every
round, one program after the other, in an order that turns from round to round. All have the same start, blocks,
hyperparameters and number of threads.

wall_seconds       of an update, the wait for its data included: the median over the rounds of their means
cpu_seconds        the same of all threads of the process
tokens_per_second  predicted, by the wall
times_ours         wall seconds of the program by those of ours, of which there are two processes, the mean, in the same
                   round: how many times faster ours is, the median; times_ours_cpu of CPU
share_of_gemm      FLOP/s of the update by those of this machine's matrix products in the same arithmetic, measured in
                   every round; the FLOPs are 6 N + 12 L H Q T a token (llm.models.flops)
peak_bytes         the highest memory during a round: the device's, or the process's where that is the CPU
first_loss         of the first update: within 1e-4 of each other in fp32, or the programs do not do the same
last_loss          of the last timed update, which stays close
same_by_same       ours by ours once more, another process: farther than 3 % from 1, no claim can be made

ours is the bare update; ours_whole, the trainer as a command, has what it does besides, and blocks in another order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gate import Program, thread_environment
from benchmarks.litgpt import has_litgpt
from benchmarks.machine import describe_machine, num_cores
from benchmarks.nanogpt import require_nanogpt
from benchmarks.settings import Setting
from benchmarks.starting import Size, require_run_clm, write_start

Round = dict[str, Any]

AGAIN = "ours_again"
# Updates that are not timed, beside the first, unless a round has fewer: memory is taken and kernels are chosen.
_NUM_WARM_UPS = 3
# An accelerator makes so many times the updates of a CPU in a round, and is still done sooner.
_ON_CUDA = 40
_QUIET = 0.03
_FIRST_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
_LAST_TOLERANCE = 5e-2
# It reads the same ids, but begins with other blocks.
_SHUFFLES = "ours_whole"

# Turns of a few seconds at most: a machine's speed may drift, and what is compared should be near in time.
SIZES = {
    "4x128": Size(layers=4, heads=4, width=128, block=64, batch=12, vocabulary=65, updates=10),
    "6x384": Size(layers=6, heads=6, width=384, block=256, batch=16, vocabulary=65, updates=1),
    "124M": Size(layers=12, heads=12, width=768, block=1024, batch=4, vocabulary=50_304, updates=1),
    "2x32": Size(layers=2, heads=2, width=32, block=32, batch=8, vocabulary=97, updates=20),
}
CHOICES = (
    *("ours_whole", "ours_eager", "ours_fp32", "ours_returning", "nanogpt", "nanogpt_bf16", "nanogpt_compile"),
    *("run_clm", "run_clm_bf16", "trainer", "litgpt", "litgpt_fp32"),
)
_DEFAULT = tuple(name for name in CHOICES if name not in ("nanogpt_compile", "ours_returning"))


@dataclass
class Measured:
    """A program's process, and what it answered: the first update, then each round."""

    name: str
    process: Program
    rounds: list[Round]

    def median(self, key: str) -> float:
        """Of an update."""
        return float(statistics.median(each[key] / each["num_updates"] for each in self.rounds))

    def play(self, num_updates: int) -> None:
        """One round."""
        self.rounds.append({**self.process.ask(num_updates), "num_updates": num_updates})


def main() -> None:
    """Measures, prints and writes the result."""
    options = _parser().parse_args()
    import torch

    for name in ("rounds", "batch"):
        if (given := getattr(options, name)) is not None and given < 1:
            sys.exit(f"--{name} {given}: at least 1")
    if unknown := [name for name in options.programs if name not in CHOICES]:
        sys.exit(f"--programs {','.join(unknown)}: known are {', '.join(CHOICES)}")
    if options.nanogpt is not None:
        options.nanogpt = options.nanogpt.resolve()
        require_nanogpt(options.nanogpt)
    if options.run_clm is not None:
        require_run_clm(options.run_clm)
    size = SIZES[options.size]
    if options.batch is not None:
        size = replace(size, batch=options.batch)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    num_updates = options.updates or size.updates * (_ON_CUDA if device == "cuda" else 1)
    num_planned = 1 + min(_NUM_WARM_UPS, num_updates) + options.rounds * num_updates
    with tempfile.TemporaryDirectory() as name:
        setting = write_start(
            *(Path(name), size, num_planned, device, options.nanogpt if options.model_type == "gpt2" else None),
            model_type=options.model_type,
            nanogpt_bias=options.nanogpt_bias,
        )
        result = measure(options, Path(name), setting, num_updates)
    result |= {
        "size": options.size,
        "model": {"model_type": options.model_type, **asdict(size)},
        "updates_a_round": num_updates,
        "nanogpt_bias": options.nanogpt_bias,
        "threads": options.threads,
    }
    result["machine"] = describe_machine("torch", "transformers", "accelerate", "datasets", "numpy")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(_table(result)))
    print(f"written to {options.json}")
    if result["unequal"]:
        sys.exit("the programs do not do the same: " + "; ".join(result["unequal"]))


def measure(options: argparse.Namespace, folder: Path, setting: Setting, num_updates: int) -> dict[str, Any]:
    """All rounds of all programs."""
    file = folder / "setting.json"
    setting.write(file)
    environment = thread_environment(options.threads, setting.device)
    programs, gemm, skipped = _start(options, file, setting, environment)
    try:
        for program in programs:
            program.process.ask(min(_NUM_WARM_UPS, num_updates))
        for number in range(options.rounds):
            gemm.play(1)
            turn = number % len(programs)
            for program in [*programs[turn:], *programs[:turn]]:
                program.play(num_updates)
            shown = ", ".join(f"{each.name} {_last_milliseconds(each):.1f}" for each in programs)
            print(f"round {number + 1}, ms an update: {shown}", flush=True)
        return _result(programs, gemm, setting) | {"skipped": skipped}
    finally:
        for program in [*programs, gemm]:
            program.process.close()


def _start(
    options: argparse.Namespace, file: Path, setting: Setting, environment: dict[str, str]
) -> tuple[list[Measured], Measured, dict[str, str]]:
    """The processes, each behind its first update: the programs, that of the products, and why others are not there."""

    def start(program: str, name: str) -> Measured:
        print(f"starting {name}", flush=True)
        python = options.litgpt if program.startswith("litgpt") else sys.executable
        return Measured(name, Program(["benchmarks.programs", program, str(file)], environment, python), [])

    gemm = start("gemm", "gemm")
    programs = [start("ours", "ours"), start("ours", AGAIN)]
    skipped = {}
    for name in options.programs:
        reason = _reason_to_skip(name, options, setting, gemm.process.first, programs[0].process.first)
        if reason is None:
            programs.append(start(name, name))
        else:
            skipped[name] = reason
            print(f"{name} is skipped: {reason}", flush=True)
    return programs, gemm, skipped


def _reason_to_skip(
    name: str, options: argparse.Namespace, setting: Setting, gemm: dict[str, Any], ours: dict[str, Any]
) -> str | None:
    if name.startswith("litgpt") and setting.model_type != "gpt_neox":
        return "it has no GPT-2 (measure it with --model_type gpt_neox)"
    if name.startswith("litgpt") and not has_litgpt(options.litgpt):
        return "it is not installed (--litgpt PYTHON names an interpreter that has it)"
    if name.startswith("nanogpt") and setting.model_type != "gpt2":
        return "it has GPT-2 alone"
    if name == "ours_eager" and not ours["compiled"]:
        return "ours is not compiled here"
    if name == "ours_fp32" and ours["arithmetic"] == "fp32":
        return "ours is fp32 here"
    if name.startswith("nanogpt") and setting.nanogpt_dir is None:
        return "no --nanogpt"
    if name == "nanogpt_bf16" and setting.device != "cpu":
        return "nanogpt is bf16 here as it is"
    if name in ("nanogpt_bf16", "run_clm_bf16") and not gemm["bf16_is_native"]:
        rates = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in gemm["quick_flops"].items())
        return f"this machine does not multiply bf16 natively ({rates})"
    return None


def _result(programs: list[Measured], gemm: Measured, setting: Setting) -> dict[str, Any]:
    rates = {"fp32": statistics.median(each["fp32"] for each in gemm.rounds)}
    if "bf16" in gemm.rounds[0]:
        rates["bf16"] = statistics.median(each["bf16"] for each in gemm.rounds)
    ours, again = programs[0], programs[1]
    flops = ours.process.first["flops_per_token"]
    tokens = setting.micro_batch * setting.block_size
    same = ours.median("wall_seconds") / again.median("wall_seconds")
    found = {}
    for program in programs:
        first, wall, cpu = program.process.first, program.median("wall_seconds"), program.median("cpu_seconds")
        rate = rates.get(first["arithmetic"])
        found[program.name] = {
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "tokens_per_second": tokens / wall,
            "times_ours": times(program.rounds, ours.rounds, again.rounds, "wall_seconds"),
            "times_ours_cpu": times(program.rounds, ours.rounds, again.rounds, "cpu_seconds"),
            "share_of_gemm": None if rate is None else flops * tokens / wall / rate,
            "peak_bytes": max(each["peak_bytes"] for each in program.rounds),
            "first_loss": first["loss"],
            "last_loss": program.rounds[-1]["loss"],
            "arithmetic": first["arithmetic"],
            "says": {key: first[key] for key in ("threads", "compiled", "says") if key in first},
            "rounds": program.rounds,
        }
    return {
        "programs": found,
        "same_by_same": same,
        "is_quiet": abs(same - 1) <= _QUIET,
        "unequal": unequal(found),
        "gemm_flops": rates,
        "flops_per_token": flops,
        "device": setting.device,
    }


def times(rounds: list[Round], ours: list[Round], again: list[Round], key: str) -> float:
    """How many times as long as ours: round by round, since a machine drifts, and of two, since no two are alike."""
    triples = zip(rounds, ours, again, strict=True)
    return statistics.median(2 * each[key] / (one[key] + other[key]) for each, one, other in triples)


def unequal(programs: dict[str, dict[str, Any]]) -> list[str]:
    """What shows that programs do not do the same; the first in fp32 is what the others are held against."""
    exact = [each for each in programs.values() if each["arithmetic"] == "fp32"] or list(programs.values())
    found = []
    for name, each in programs.items():
        first = _LAST_TOLERANCE if name == _SHUFFLES else _FIRST_TOLERANCE[each["arithmetic"]]
        for key, tolerance in (("first_loss", first), ("last_loss", _LAST_TOLERANCE)):
            if not abs(each[key] - exact[0][key]) <= tolerance:  # nor may it be nan
                found.append(f"{key} of {name} is {each[key]:.5f}, not {exact[0][key]:.5f}")
    threads = {name: each["says"]["threads"] for name, each in programs.items()}
    if len(set(threads.values())) > 1:
        found.append(f"threads differ: {threads}")
    return found


def _last_milliseconds(program: Measured) -> float:
    newest = program.rounds[-1]
    return float(newest["wall_seconds"]) / newest["num_updates"] * 1e3


def _table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'':16}  arith  wall ms   CPU ms    tok/s  x ours  x CPU  of GEMM  peak MB  first loss  last loss"]
    for name, each in result["programs"].items():
        share = "" if each["share_of_gemm"] is None else f"{each['share_of_gemm']:.1%}"
        lines.append(
            f"{name:16} {each['arithmetic']:>6} {each['wall_seconds'] * 1e3:8.1f} {each['cpu_seconds'] * 1e3:8.1f}"
            f" {each['tokens_per_second']:8.0f} {each['times_ours']:7.2f} {each['times_ours_cpu']:6.2f} {share:>8}"
            f" {each['peak_bytes'] / 1e6:8.0f} {each['first_loss']:11.5f} {each['last_loss']:10.4f}"
        )
    lines += [f"{name:16} skipped: {reason}" for name, reason in result["skipped"].items()]
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in result["gemm_flops"].items())
    lines.append(f"matrix products: {rates}")
    verdict = "quiet" if result["is_quiet"] else "NOT QUIET: no claim can be made"
    return [*lines, f"same_by_same {result['same_by_same']:.3f}: {verdict}"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--nanogpt_bias", action="store_true", help="nanoGPT has biases, as GPT-2 (as shipped: none)")
    parser.add_argument("--run_clm", type=Path, help="run_clm_no_trainer.py: read, to see that its step is what is run")
    parser.add_argument("--litgpt", metavar="PYTHON", default=sys.executable, help="an interpreter with litgpt")
    parser.add_argument("--model_type", choices=("gpt2", "gpt_neox"), default="gpt2", help="(default: gpt2)")
    parser.add_argument("--size", choices=SIZES, default="4x128")
    parser.add_argument(
        "--batch", type=int, help="blocks of an update, which a GPU needs more of (default: the size's)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, help="of each program in a round (default: by the size)")
    parser.add_argument("--threads", type=int, default=num_cores(), help="of every program (default: all cores)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="(default: cuda where there is one)")
    parser.add_argument(
        "--programs",
        type=lambda words: [word for word in words.split(",") if word],
        default=list(_DEFAULT),
        help=f"beside ours, of {', '.join(CHOICES)} (default: {','.join(_DEFAULT)})",
    )
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/throughput.json"), help="the result")
    return parser


if __name__ == "__main__":
    main()
