"""Time of a training step of llm and of other trainers: `python -m benchmarks.throughput --nanogpt DIR --json OUT`.

Every program (described in `benchmarks.programs`) has its own process and runs a few steps in every round, one program
after the other; the order rotates from round to round. All have the same start, blocks, hyperparameters and number of
threads.

wall_seconds       time of a step, including the wait for its data: median over the rounds of their means
cpu_seconds        CPU time of a step, of all threads of the process
tokens_per_second  predicted tokens per second of wall time
times_ours         wall time of the program divided by the mean wall time of the two processes of ours in the same
                   round, the median over the rounds: how many times faster ours is; times_ours_cpu: of CPU time
share_of_gemm      FLOP/s of the step divided by those of matrix products on this machine in the same arithmetic,
                   measured in every round; a token takes 6 N + 12 L H Q T FLOPs (llm.models.flops)
peak_bytes         peak of memory during a round, of the device, or of the process if the device is the CPU
first_loss         loss of the first step: in fp32 within 1e-4 of each other, otherwise the programs are not equal
last_loss          loss of the last timed step, which stays close
same_by_same       ours divided by a second process of ours: if it is more than 3 % from 1, the machine was too noisy
                   for any claim

ours_old is ours in another checkout of this repository (--old_checkout DIR), to show that a change costs no time.

ours is the step alone; ours_full_trainer is the command of the trainer with all that it does besides, and it reads the
blocks in another order.
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
# Steps that are not timed, besides the first one: they allocate memory and choose kernels. Fewer if a round is shorter.
_NUM_WARM_UPS = 3
# Factor of the steps per round on an accelerator, which still takes less time than a CPU.
_CUDA_FACTOR = 40
# Largest distance of `same_by_same` from 1 on a quiet machine.
_MAX_NOISE = 0.03
_FIRST_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
_LAST_TOLERANCE = 5e-2
# These read the same ids in another order. Earlier results name the full trainer `ours_whole`.
_SHUFFLING_PROGRAMS = ("ours_full_trainer", "ours_whole")

# A round takes each program a few seconds at most: the speed of a machine may drift, so the programs should run close
# together in time.
SIZES = {
    "4x128": Size(layers=4, heads=4, width=128, block=64, batch=12, vocabulary=65, updates=10),
    "6x384": Size(layers=6, heads=6, width=384, block=256, batch=16, vocabulary=65, updates=1),
    "124M": Size(layers=12, heads=12, width=768, block=1024, batch=4, vocabulary=50_304, updates=1),
    "2x32": Size(layers=2, heads=2, width=32, block=32, batch=8, vocabulary=97, updates=20),
}
# The same program from another checkout of this repository.
OLD = {"ours_old": "ours"}
CHOICES = (
    *("ours_full_trainer", "ours_eager", "ours_fp32", "ours_returning", "nanogpt", "nanogpt_bf16", "nanogpt_compile"),
    *("run_clm", "run_clm_bf16", "trainer", "litgpt", "litgpt_fp32", *OLD),
)
_DEFAULT = tuple(name for name in CHOICES if name not in ("nanogpt_compile", "ours_returning", *OLD))


@dataclass
class MeasuredProgram:
    """A program and its reports, one per round.

    Attributes:
        name: name of the program in the result.
        process: the running program.
        rounds: report of each round, with `num_updates`.
    """

    name: str
    process: Program
    rounds: list[Round]

    def median(self, key: str) -> float:
        """Return the median over the rounds of a value per step."""
        return float(statistics.median(report[key] / report["num_updates"] for report in self.rounds))

    def run_round(self, num_updates: int) -> None:
        """Run one round of steps and keep its report."""
        self.rounds.append({**self.process.run_updates(num_updates), "num_updates": num_updates})


def main() -> None:
    """Measure, print and write the result."""
    options = _parser().parse_args()
    import torch

    for name in ("rounds", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            sys.exit(f"--{name} {value}: must be at least 1")
    if unknown := [name for name in options.programs if name not in CHOICES]:
        sys.exit(f"--programs {','.join(unknown)}: unknown; choose from {', '.join(CHOICES)}")
    if options.nanogpt is not None:
        options.nanogpt = options.nanogpt.resolve()
        require_nanogpt(options.nanogpt)
    if options.run_clm is not None:
        require_run_clm(options.run_clm)
    size = SIZES[options.size]
    if options.batch is not None:
        size = replace(size, batch=options.batch)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    num_updates = options.updates or size.updates * (_CUDA_FACTOR if device == "cuda" else 1)
    num_planned = 1 + min(_NUM_WARM_UPS, num_updates) + options.rounds * num_updates
    with tempfile.TemporaryDirectory() as name:
        setting = write_start(
            Path(name),
            size,
            num_planned,
            device,
            options.nanogpt if options.model_type == "gpt2" else None,
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
        sys.exit("the programs are not equal: " + "; ".join(result["unequal"]))


def measure(options: argparse.Namespace, folder: Path, setting: Setting, num_updates: int) -> dict[str, Any]:
    """Run all rounds of all programs and return the result."""
    file = folder / "setting.json"
    setting.write(file)
    environment = thread_environment(options.threads, setting.device)
    programs, gemm, skipped = _start(options, file, setting, environment)
    try:
        for program in programs:
            program.process.run_updates(min(_NUM_WARM_UPS, num_updates))
        for number in range(options.rounds):
            gemm.run_round(1)
            offset = number % len(programs)
            for program in [*programs[offset:], *programs[:offset]]:
                program.run_round(num_updates)
            times_of_round = ", ".join(f"{program.name} {_last_milliseconds(program):.1f}" for program in programs)
            print(f"round {number + 1}, ms per step: {times_of_round}", flush=True)
        return _result(programs, gemm, setting) | {"skipped": skipped}
    finally:
        for program in [*programs, gemm]:
            program.process.close()


def _start(
    options: argparse.Namespace, file: Path, setting: Setting, environment: dict[str, str]
) -> tuple[list[MeasuredProgram], MeasuredProgram, dict[str, str]]:
    """Start the processes; each has run its first step.

    Returns:
        The programs, the program that measures matrix products, and the reasons why programs are skipped.
    """

    def start(program: str, name: str) -> MeasuredProgram:
        print(f"starting {name}", flush=True)
        python = options.litgpt if program.startswith("litgpt") else sys.executable
        checkout = options.old_checkout if program in OLD else None
        command = ["benchmarks.programs", OLD.get(program, program), str(file)]
        return MeasuredProgram(name, Program(command, environment, python, checkout), [])

    gemm = start("gemm", "gemm")
    programs = [start("ours", "ours"), start("ours", AGAIN)]
    skipped = {}
    for name in options.programs:
        reason = _reason_to_skip(name, options, setting, gemm.process.first_report, programs[0].process.first_report)
        if reason is None:
            programs.append(start(name, name))
        else:
            skipped[name] = reason
            print(f"skipping {name}: {reason}", flush=True)
    return programs, gemm, skipped


def _reason_to_skip(
    name: str, options: argparse.Namespace, setting: Setting, gemm: dict[str, Any], ours: dict[str, Any]
) -> str | None:
    """Why this program is not measured; None if it is. `gemm` and `ours` are the first reports of these programs."""
    if name in OLD and options.old_checkout is None:
        return "--old_checkout is not given"
    if name.startswith("litgpt") and setting.model_type != "gpt_neox":
        return "litgpt has no GPT-2 (use --model_type gpt_neox)"
    if name.startswith("litgpt") and not has_litgpt(options.litgpt):
        return "litgpt is not installed (name a Python interpreter that has it with --litgpt PYTHON)"
    if name.startswith("nanogpt") and setting.model_type != "gpt2":
        return "nanoGPT supports GPT-2 only"
    if name == "ours_eager" and not ours["compiled"]:
        return "ours is not compiled on this machine"
    if name == "ours_fp32" and ours["arithmetic"] == "fp32":
        return "ours is fp32 on this machine"
    if name.startswith("nanogpt") and setting.nanogpt_dir is None:
        return "--nanogpt is not given"
    if name == "nanogpt_bf16" and setting.device != "cpu":
        return "nanogpt itself uses bf16 on this device"
    if name in ("nanogpt_bf16", "run_clm_bf16") and not gemm["bf16_is_native"]:
        rates = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in gemm["quick_flops"].items())
        return f"this machine does not multiply bf16 natively ({rates})"
    return None


def _result(programs: list[MeasuredProgram], gemm: MeasuredProgram, setting: Setting) -> dict[str, Any]:
    """The result of all rounds; the first two programs are ours."""
    gemm_rates = {"fp32": statistics.median(report["fp32"] for report in gemm.rounds)}
    if "bf16" in gemm.rounds[0]:
        gemm_rates["bf16"] = statistics.median(report["bf16"] for report in gemm.rounds)
    ours = programs[0]
    again = programs[1]
    flops = ours.process.first_report["flops_per_token"]
    tokens = setting.micro_batch * setting.block_size
    same = ours.median("wall_seconds") / again.median("wall_seconds")
    results = {}
    for program in programs:
        first = program.process.first_report
        wall = program.median("wall_seconds")
        gemm_rate = gemm_rates.get(first["arithmetic"])
        results[program.name] = {
            "wall_seconds": wall,
            "cpu_seconds": program.median("cpu_seconds"),
            "tokens_per_second": tokens / wall,
            "times_ours": times(program.rounds, ours.rounds, again.rounds, "wall_seconds"),
            "times_ours_cpu": times(program.rounds, ours.rounds, again.rounds, "cpu_seconds"),
            "share_of_gemm": None if gemm_rate is None else flops * tokens / wall / gemm_rate,
            "peak_bytes": max(report["peak_bytes"] for report in program.rounds),
            "first_loss": first["loss"],
            "last_loss": program.rounds[-1]["loss"],
            "arithmetic": first["arithmetic"],
            "says": {key: first[key] for key in ("threads", "compiled", "says") if key in first},
            "rounds": program.rounds,
        }
    return {
        "programs": results,
        "same_by_same": same,
        "is_quiet": abs(same - 1) <= _MAX_NOISE,
        "unequal": unequal(results),
        "gemm_flops": gemm_rates,
        "flops_per_token": flops,
        "device": setting.device,
    }


def times(rounds: list[Round], ours: list[Round], again: list[Round], key: str) -> float:
    """Return how many times as long a program takes as ours: the median of the ratios of all rounds.

    Each round is compared with the same round of ours, because the speed of a machine drifts, and with the mean of two
    processes of ours, because no two processes are equally fast.

    Args:
        rounds: reports of the program.
        ours: reports of the first process of ours.
        again: reports of the second process of ours.
        key: key of the time in a report.
    """
    triples = zip(rounds, ours, again, strict=True)
    return statistics.median(2 * report[key] / (first[key] + second[key]) for report, first, second in triples)


def unequal(programs: dict[str, dict[str, Any]]) -> list[str]:
    """Return the differences that show that programs do not compute the same; the reference is the first in fp32."""
    in_fp32 = [result for result in programs.values() if result["arithmetic"] == "fp32"]
    reference = in_fp32[0] if in_fp32 else next(iter(programs.values()))
    differences = []
    for name, result in programs.items():
        first_tolerance = _FIRST_TOLERANCE[result["arithmetic"]]
        if name in _SHUFFLING_PROGRAMS:
            first_tolerance = _LAST_TOLERANCE
        for key, tolerance in (("first_loss", first_tolerance), ("last_loss", _LAST_TOLERANCE)):
            if not abs(result[key] - reference[key]) <= tolerance:  # true for nan too
                differences.append(f"{key} of {name} is {result[key]:.5f}, not {reference[key]:.5f}")
    threads = {name: result["says"]["threads"] for name, result in programs.items()}
    if len(set(threads.values())) > 1:
        differences.append(f"threads differ: {threads}")
    return differences


def _last_milliseconds(program: MeasuredProgram) -> float:
    last_round = program.rounds[-1]
    return float(last_round["wall_seconds"]) / last_round["num_updates"] * 1e3


def _table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'':17}  arith  wall ms   CPU ms    tok/s  x ours  x CPU  of GEMM  peak MB  first loss  last loss"]
    for name, program in result["programs"].items():
        share = "" if program["share_of_gemm"] is None else f"{program['share_of_gemm']:.1%}"
        lines.append(
            f"{name:17} {program['arithmetic']:>6}"
            f" {program['wall_seconds'] * 1e3:8.1f} {program['cpu_seconds'] * 1e3:8.1f}"
            f" {program['tokens_per_second']:8.0f} {program['times_ours']:7.2f} {program['times_ours_cpu']:6.2f}"
            f" {share:>8} {program['peak_bytes'] / 1e6:8.0f}"
            f" {program['first_loss']:11.5f} {program['last_loss']:10.4f}"
        )
    lines += [f"{name:17} skipped: {reason}" for name, reason in result["skipped"].items()]
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in result["gemm_flops"].items())
    lines.append(f"matrix products: {rates}")
    verdict = "quiet" if result["is_quiet"] else "NOT QUIET: the machine was too noisy for any claim"
    return [*lines, f"same_by_same {result['same_by_same']:.3f}: {verdict}"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument(
        "--nanogpt_bias", action="store_true", help="train nanoGPT with biases, as in GPT-2 (default: none)"
    )
    parser.add_argument(
        "--run_clm", type=Path, help="run_clm_no_trainer.py, to check that its step is the measured one"
    )
    parser.add_argument(
        "--litgpt", metavar="PYTHON", default=sys.executable, help="a Python interpreter that has litgpt"
    )
    parser.add_argument("--old_checkout", type=Path, help="another checkout of this repository: ours_old is ours there")
    parser.add_argument("--model_type", choices=("gpt2", "gpt_neox"), default="gpt2", help="(default: gpt2)")
    parser.add_argument("--size", choices=SIZES, default="4x128")
    parser.add_argument("--batch", type=int, help="blocks per step; a GPU needs more of them (default: by the size)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, help="steps of each program per round (default: by the size)")
    parser.add_argument(
        "--threads", type=int, default=num_cores(), help="threads of every program (default: all cores)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="(default: cuda if available)")
    parser.add_argument(
        "--programs",
        type=lambda text: [name for name in text.split(",") if name],
        default=list(_DEFAULT),
        help=f"programs besides ours, from {', '.join(CHOICES)} (default: {','.join(_DEFAULT)})",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/throughput.json"), help="file of the result"
    )
    return parser


if __name__ == "__main__":
    main()
