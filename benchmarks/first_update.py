"""Time from the command to the end of the first step: `python -m benchmarks.first_update --text FILE --json OUT`.

Runs examples/shakespeare_char_cpu.toml on text that was tokenized before, each time in a new process, in turn with a
process that only imports the modules that the first one had imported by then.

run_seconds      from the start of the process to the end of the first step: wall, and CPU of all threads
import_seconds   the same for the imports alone
ratio            run_seconds divided by import_seconds, of the medians
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

# Both programs report the age of their process, which includes the start of the interpreter.
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
import llm.training.updaters.synchronous as synchronous
update = synchronous.SynchronousUpdater.update
def first_update(*args, **kwargs):
    update(*args, **kwargs)
    print(json.dumps({"age": age(), "modules": [name for name in sys.modules if name != "__main__"]}), flush=True)
    os._exit(0)
synchronous.SynchronousUpdater.update = first_update
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
    except Exception:  # created at run time, not importable
        pass
print(json.dumps({"age": age()}), flush=True)
os._exit(0)
"""
)


def main() -> None:
    """Measure, print and write the result."""
    options = _parser().parse_args()
    options.text = options.text.resolve()
    if not options.text.is_file():
        sys.exit(f"--text {options.text}: no such file")
    ages: dict[str, list[dict[str, float]]] = {"run": [], "import": []}
    with tempfile.TemporaryDirectory() as name:
        environment = {**os.environ, **thread_environment(options.threads, "cpu")}
        _first_update(options.text, Path(name) / "warm", environment)  # tokenizes the text
        for number in range(options.rounds):
            answer = _first_update(options.text, Path(name) / str(number), environment)
            ages["run"].append(answer["age"])
            imports = _run_process([sys.executable, "-c", _IMPORTS], environment, answer["modules"])
            ages["import"].append(imports["age"])
            print(
                f"round {number + 1}: " + ", ".join(f"{name} {measured[-1]}" for name, measured in ages.items()),
                flush=True,
            )
    result = summary(ages) | {"rounds": ages, "threads": options.threads}
    result["machine"] = describe_machine("torch", "transformers", "accelerate", "datasets", "numpy")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    ratios = ", ".join(f"{clock} {ratio:.2f}" for clock, ratio in result["ratio"].items())
    print(f"first step divided by imports: {ratios}")
    print(f"written to {options.json}")


def summary(ages: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return the medians of the ages of both processes, and their ratio, for each clock."""
    medians = {
        name: {clock: statistics.median(age[clock] for age in measured) for clock in ("wall", "cpu")}
        for name, measured in ages.items()
    }
    ratio = {clock: medians["run"][clock] / medians["import"][clock] for clock in ("wall", "cpu")}
    return {"run_seconds": medians["run"], "import_seconds": medians["import"], "ratio": ratio}


def _first_update(text: Path, output_dir: Path, environment: dict[str, str]) -> dict[str, Any]:
    args = ["--config", str(EXAMPLE), "--train_file", str(text), "--output_dir", str(output_dir), "--use_cpu"]
    return _run_process([sys.executable, "-c", _RUN, *args], environment, None)


def _run_process(command: list[str], environment: dict[str, str], value: Any) -> dict[str, Any]:
    """Run a process with `value` as JSON on stdin; return the last line that it prints, parsed as JSON."""
    process = subprocess.run(
        command, input=json.dumps(value), env=environment, capture_output=True, text=True, check=False
    )
    if process.returncode or not process.stdout.strip():
        sys.exit(f"a measured process ended with code {process.returncode}:\n{process.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return answer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.first_update", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="text to train on, such as tinyshakespeare")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/first_update.json"), help="file of the result"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=num_cores(), help="threads of each process (default: all cores)")
    return parser


if __name__ == "__main__":
    main()
