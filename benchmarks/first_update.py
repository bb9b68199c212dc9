"""From the command to the first update: `python -m benchmarks.first_update --text FILE --json OUT`.

examples/shakespeare_char_cpu.toml on text that was tokenized before, in a new process each time, in turn with one that
only imports what the first had imported by then.

run_seconds      from the start of the process to the end of the first update: wall, and CPU of all threads
import_seconds   the same of the imports alone
ratio            run by imports, of the medians
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gate import thread_environment
from benchmarks.machine import describe_machine, num_cores

EXAMPLE = Path("examples/shakespeare_char_cpu.toml")

# Both say how old their process is, the interpreter's own start included.
_AGE = """
import json, os, sys, time
def age():
    ticks = float(open("/proc/self/stat").read().rpartition(")")[2].split()[19])
    born = ticks / os.sysconf("SC_CLK_TCK")
    return {"wall": time.clock_gettime(time.CLOCK_BOOTTIME) - born, "cpu": time.process_time()}
"""
_RUN = (
    _AGE
    + """
import llm.training.updaters.synchronous as central
update = central.SynchronousUpdater.update
def first(*given, **named):
    update(*given, **named)
    print(json.dumps({"age": age(), "modules": [name for name in sys.modules if name != "__main__"]}), flush=True)
    os._exit(0)
central.SynchronousUpdater.update = first
from llm.trainers.gpt import main
sys.exit(main(sys.argv[1:]))
"""
)
_IMPORTS = (
    _AGE
    + """
import importlib
for name in json.load(sys.stdin):
    try:
        importlib.import_module(name)
    except Exception:  # made while running, not imported
        pass
print(json.dumps({"age": age()}), flush=True)
os._exit(0)
"""
)


def main() -> None:
    """Measures, prints and writes the result."""
    options = _parser().parse_args()
    options.text = options.text.resolve()
    if not options.text.is_file():
        sys.exit(f"--text {options.text}: no such file")
    ages: dict[str, list[dict[str, float]]] = {"run": [], "import": []}
    with tempfile.TemporaryDirectory() as name:
        environment = {**os.environ, **thread_environment(options.threads, "cpu")}
        _first(options.text, Path(name) / "warm", environment)  # tokenizes
        for number in range(options.rounds):
            found = _first(options.text, Path(name) / str(number), environment)
            ages["run"].append(found["age"])
            ages["import"].append(_answer([sys.executable, "-c", _IMPORTS], environment, found["modules"])["age"])
            print(f"round {number + 1}: " + ", ".join(f"{way} {each[-1]}" for way, each in ages.items()), flush=True)
    result = summary(ages) | {"rounds": ages, "threads": options.threads}
    result["machine"] = describe_machine("torch", "transformers", "accelerate", "datasets", "numpy")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print("first update by imports: " + ", ".join(f"{clock} {x:.2f}" for clock, x in result["ratio"].items()))
    print(f"written to {options.json}")


def summary(ages: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of both, and their quotient, by each clock."""
    medians = {
        way: {clock: statistics.median(age[clock] for age in each) for clock in ("wall", "cpu")}
        for way, each in ages.items()
    }
    ratio = {clock: medians["run"][clock] / medians["import"][clock] for clock in ("wall", "cpu")}
    return {"run_seconds": medians["run"], "import_seconds": medians["import"], "ratio": ratio}


def _first(text: Path, output_dir: Path, environment: dict[str, str]) -> dict[str, Any]:
    words = ["--config", str(EXAMPLE), "--train_file", str(text), "--output_dir", str(output_dir), "--use_cpu"]
    return _answer([sys.executable, "-c", _RUN, *words], environment, None)


def _answer(command: list[str], environment: dict[str, str], given: Any) -> dict[str, Any]:
    """The last line that a process prints, as JSON."""
    done = subprocess.run(
        command, input=json.dumps(given), env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode or not done.stdout.strip():
        sys.exit(f"a measured process ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.first_update", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="what to train on, such as tinyshakespeare")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/first_update.json"), help="the result")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=num_cores(), help="of each process (default: all cores)")
    return parser


if __name__ == "__main__":
    main()
