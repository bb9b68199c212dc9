"""What K-FAC adds to the trainer's update: `python -m benchmarks.kfac_cost --json OUT`.

The update without it, the same once more, and with it by each method, every one in a process of its own and none
compiled; all make some updates in every round, in an order that turns. A round is a multiple of the interval, so that
each has as many looks at the curvature and refreshes as any other; those of the first updates, which are more, are not
timed.

cpu_seconds    of an update, all threads: the median over the rounds of their means
share          of the update without K-FAC, by CPU seconds: the median over the rounds of what is added in each
same_by_same   the update without it by itself, once more: what the machine's other work does to such a quotient
computed       the matrix work that the run itself says it adds, as a share of the model's own
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

_STOCK, _AGAIN = "without", "without, again"
WAYS = {
    _STOCK: "ours_eager",
    _AGAIN: "ours_eager",
    "eigen": "ours_kfac",
    "inverse": "ours_kfac_inverse",
    "eigen, spread": "ours_kfac_spread",
}
# Behind the dense early updates, and the first of those that follow an interval.
_NUM_WARM_UPS = 2 * KFAC_INTERVAL


def main() -> None:
    """Measures, prints and writes the result."""
    options = _parser().parse_args()
    num_updates = options.intervals * KFAC_INTERVAL
    planned = 1 + _NUM_WARM_UPS + options.rounds * num_updates
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_start(folder, SIZES[options.size], planned, "cpu", None).write(folder / "setting.json")
        environment = thread_environment(options.threads, "cpu")
        programs = {
            way: Program(["benchmarks.programs", program, str(folder / "setting.json")], environment)
            for way, program in WAYS.items()
        }
        try:
            for program in programs.values():
                program.ask(_NUM_WARM_UPS)
            order = list(programs)
            for number in range(options.rounds):
                for way in order:
                    seconds[way].append(programs[way].ask(num_updates)["cpu_seconds"] / num_updates)
                order.append(order.pop(0))
                last = ", ".join(f"{way} {each[-1] * 1e3:.1f}" for way, each in seconds.items())
                print(f"round {number + 1}, CPU ms: {last}", flush=True)
            result = summary(seconds, {way: program.first for way, program in programs.items()})
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
    for way, found in result["ways"].items():
        print(f"{way:16} {found['cpu_seconds'] * 1e3:7.1f} ms CPU, {found['share']:+.1%}; computed {found['computed']}")
    print(f"same_by_same {result['same_by_same']:.3f}; written to {options.json}")


def summary(seconds: dict[str, list[float]], first: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians, and shares of the update without K-FAC in the same round."""

    def quotient(way: str) -> float:
        return statistics.median(own / stock for own, stock in zip(seconds[way], seconds[_STOCK], strict=True))

    ways = {
        way: {
            "cpu_seconds": statistics.median(each),
            "share": quotient(way) - 1,
            "computed": _computed(first[way].get("kfac")),
            "rounds": each,
        }
        for way, each in seconds.items()
    }
    return {"ways": ways, "same_by_same": quotient(_AGAIN)}


def _computed(line: str | None) -> str | None:
    """The share in the line with which a run with K-FAC begins."""
    found = re.search(r"(\d+%) of the model's own", line or "")
    return None if found is None else found[1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kfac_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="4x128")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--intervals", type=int, default=2, help="in a round")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/kfac_cost.json"), help="the result")
    return parser


if __name__ == "__main__":
    main()
