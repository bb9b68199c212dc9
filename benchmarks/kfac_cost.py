"""Time that K-FAC adds to the trainer's step: `python -m benchmarks.kfac_cost --json OUT`.

The variants are the step without K-FAC, the same again, and the step with each method of K-FAC. Each variant runs in a
process of its own, not compiled. All make some steps in every round, in an order that rotates. A round is a multiple of
the K-FAC interval, so that every round of a variant has the same number of factor updates and refreshes; the early
steps, which have more of them, are not timed.

The keys of the result:

cpu_seconds    CPU seconds of a step, all threads: the median over the rounds of each round's mean
share          CPU seconds that are added, as a share of the step without K-FAC: the median over the rounds
same_by_same   the step without K-FAC, divided by itself in the second process: the noise of such a quotient
computed       matrix work that the run reports to add, as a share of the model's own
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gate import Program, thread_environment
from benchmarks.machine import describe_machine, num_cores
from benchmarks.programs import KFAC_INTERVAL
from benchmarks.starting import write_start
from benchmarks.throughput import SIZES

_BASELINE = "without"
_AGAIN = "without, again"
VARIANTS = {
    _BASELINE: "ours_eager",
    _AGAIN: "ours_eager",
    "eigen": "ours_kfac",
    "inverse": "ours_kfac_inverse",
    "eigen, spread": "ours_kfac_spread",
}
# After the dense early updates, and after the first steps that follow an interval.
_NUM_WARM_UPS = 2 * KFAC_INTERVAL


def main() -> None:
    """Measure, print and write the result."""
    options = _parser().parse_args()
    num_updates = options.intervals * KFAC_INTERVAL
    planned = 1 + _NUM_WARM_UPS + options.rounds * num_updates
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_start(folder, SIZES[options.size], planned, "cpu", None).write(folder / "setting.json")
        environment = thread_environment(options.threads, "cpu")
        programs = {
            variant: Program(["benchmarks.programs", program, str(folder / "setting.json")], environment)
            for variant, program in VARIANTS.items()
        }
        try:
            for program in programs.values():
                program.run_updates(_NUM_WARM_UPS)
            order = list(programs)
            for number in range(options.rounds):
                for variant in order:
                    measured = programs[variant].run_updates(num_updates)["cpu_seconds"]
                    seconds[variant].append(measured / num_updates)
                order.append(order.pop(0))
                last = ", ".join(f"{variant} {rounds[-1] * 1e3:.1f}" for variant, rounds in seconds.items())
                print(f"round {number + 1}, CPU ms: {last}", flush=True)
            result = summary(seconds, {variant: program.first_report for variant, program in programs.items()})
        finally:
            for program in programs.values():
                program.close()
    result |= {
        "command": f"python -m benchmarks.kfac_cost --size {options.size} --threads {options.threads}"
        f" --rounds {options.rounds} --intervals {options.intervals}",
        "machine": describe_machine("torch", "transformers"),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    for variant, row in result["ways"].items():
        print(f"{variant:16} {row['cpu_seconds'] * 1e3:7.1f} ms CPU, {row['share']:+.1%}; computed {row['computed']}")
    print(f"same_by_same {result['same_by_same']:.3f}; written to {options.json}")


def summary(seconds: dict[str, list[float]], first: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return medians, and shares of the step without K-FAC in the same round.

    Args:
        seconds: variant -> CPU seconds of a step in each round.
        first: variant -> the first answer of its process.
    """

    def quotient(variant: str) -> float:
        pairs = zip(seconds[variant], seconds[_BASELINE], strict=True)
        return statistics.median(with_kfac / baseline for with_kfac, baseline in pairs)

    rows = {
        variant: {
            "cpu_seconds": statistics.median(rounds),
            "share": quotient(variant) - 1,
            "computed": _computed(first[variant].get("kfac")),
            "rounds": rounds,
        }
        for variant, rounds in seconds.items()
    }
    return {"ways": rows, "same_by_same": quotient(_AGAIN)}


def _computed(line: str | None) -> str | None:
    """Return the share in the first line that a run with K-FAC logs."""
    match = re.search(r"(\d+%) of the model's own", line or "")
    return None if match is None else match[1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kfac_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="4x128")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--intervals", type=int, default=2, help="intervals in a round")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/kfac_cost.json"), help="the result")
    return parser


if __name__ == "__main__":
    main()
