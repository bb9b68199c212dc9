"""What a checkpoint of GPT-2 124M costs the training: `python -m benchmarks.saving --json OUT`.

The trainer itself, on `builtin:python`, with saves by the clock; what is measured is how long each made the
training wait, how long it took to be durable, and how long a stop takes from the signal to the exit.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

_UPDATES_SECONDS = 90.0


def main() -> None:
    """Measures, prints and writes the result; with `--child`, is the measured process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/saving.json"), help="the result")
    parser.add_argument("--config_name", help="folder of a configuration (default: GPT-2's own, 124M)")
    parser.add_argument("--tokenizer", help="folder of a tokenizer (default: train:bpe's 8,192 tokens)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _train(options.child, options.config_name, options.tokenizer)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.config_name, options.tokenizer)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{result['megabytes']:.0f} MB: {result['stall_seconds_median'] * 1e3:.0f} ms a save,"
        f" {result['share_at_one_a_minute']:.2%} at one a minute; SIGTERM to exit {result['stop_seconds']:.1f} s;"
        f" written to {options.json}"
    )


def measure(folder: Path, config_name: str | None, tokenizer: str | None) -> dict[str, Any]:
    """One run that is stopped by SIGTERM in the end."""
    command = [sys.executable, "-m", "benchmarks.saving", "--child", str(folder / "run")]
    command += ["--config_name", config_name] if config_name else []
    child = subprocess.Popen(command + (["--tokenizer", tokenizer] if tokenizer else []))
    checkpoints = folder / "run" / "checkpoints"
    while child.poll() is None and not any(checkpoints.glob("step_*")):
        time.sleep(0.5)
    time.sleep(_UPDATES_SECONDS)
    child.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    code = child.wait()
    stop_seconds = time.monotonic() - asked
    assert code == 75, code
    newest = max(checkpoints.glob("step_*"), key=lambda path: int(path.name[5:]))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    found = json.loads((folder / "run" / "stalls.json").read_text())
    stalls = found["stalls"]
    return {
        "megabytes": sum(file.stat().st_size for file in newest.iterdir()) / 1e6,
        "stall_seconds": stalls,
        # The first copy takes the memory that the others use again.
        "stall_seconds_first": stalls[0],
        "stall_seconds_median": statistics.median(stalls[1:]),
        "share_at_one_a_minute": statistics.median(stalls[1:]) / 60,
        "seconds_until_durable": found["durable"],
        "stop_seconds": stop_seconds,
        "last_step_done": max(json.loads(line)["step"] for line in lines),
        "last_step_saved": int(newest.name[5:]),
        "machine": describe_machine("torch", "safetensors"),
    }


def _train(folder: Path, config_name: str | None, tokenizer: str | None) -> None:
    from llm.trainers.gpt import main as trainer
    from llm.training.checkpoints.async_saver import AsyncSaver

    found: dict[str, list[float]] = {"stalls": [], "durable": []}
    save, write = AsyncSaver.save, AsyncSaver._write

    def timed_save(self: AsyncSaver, *given: Any, **named: Any) -> None:
        save(self, *given, **named)
        found["stalls"].append(self.stall_seconds[-1])

    def timed_write(self: AsyncSaver, *given: Any, **named: Any) -> None:
        started = time.monotonic()
        write(self, *given, **named)
        found["durable"].append(time.monotonic() - started)
        (folder / "stalls.json").write_text(json.dumps(found))

    AsyncSaver.save, AsyncSaver._write = timed_save, timed_write  # type: ignore[method-assign]
    model = ["--config_name", config_name] if config_name else ["--model_type", "gpt2"]
    model += ["--tokenizer_name", tokenizer] if tokenizer else []
    words = [*model, "--block_size", "64", "--per_device_train_batch_size", "1", "--save_minutes", "0.5", "--seed", "1"]
    words += ["--max_train_steps", "100000", "--torch_compile", "false", "--logging_steps", "1"]
    words += ["--output_dir", str(folder)]
    sys.exit(trainer(words))


if __name__ == "__main__":
    main()
