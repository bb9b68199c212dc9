"""Cost of a checkpoint of GPT-2 124M during training: `python -m benchmarks.saving --json OUT`.

Runs the trainer on `builtin:python`, with saves at intervals of time. Measures how long each save stalls the training,
how long it takes until the checkpoint is durable, and how long a stop takes from the signal to the exit.
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

# Seconds of training between the first checkpoint and the stop.
_TRAINING_SECONDS = 90.0


def main() -> None:
    """Measure, print and write the result; with `--child`, run the measured process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/saving.json"), help="file of the result")
    parser.add_argument("--config_name", help="folder of a configuration (default: that of GPT-2 124M)")
    parser.add_argument("--tokenizer", help="folder of a tokenizer (default: train:bpe, with 8,192 tokens)")
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
        f"{result['megabytes']:.0f} MB: {result['stall_seconds_median'] * 1e3:.0f} ms per save,"
        f" {result['share_at_one_a_minute']:.2%} at one save per minute; SIGTERM to exit"
        f" {result['stop_seconds']:.1f} s; written to {options.json}"
    )


def measure(folder: Path, config_name: str | None, tokenizer: str | None) -> dict[str, Any]:
    """Run the trainer, stop it with SIGTERM, and return the result."""
    command = [sys.executable, "-m", "benchmarks.saving", "--child", str(folder / "run")]
    if config_name:
        command += ["--config_name", config_name]
    if tokenizer:
        command += ["--tokenizer", tokenizer]
    child = subprocess.Popen(command)
    checkpoints = folder / "run" / "checkpoints"
    while child.poll() is None and not any(checkpoints.glob("step_*")):
        time.sleep(0.5)
    time.sleep(_TRAINING_SECONDS)
    child.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    code = child.wait()
    stop_seconds = time.monotonic() - signalled
    assert code == 75, code
    newest = max(checkpoints.glob("step_*"), key=lambda path: int(path.name[5:]))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    seconds = json.loads((folder / "run" / "stalls.json").read_text())
    stalls = seconds["stalls"]
    return {
        "megabytes": sum(file.stat().st_size for file in newest.iterdir()) / 1e6,
        "stall_seconds": stalls,
        # The first copy allocates the memory that later copies reuse.
        "stall_seconds_first": stalls[0],
        "stall_seconds_median": statistics.median(stalls[1:]),
        "share_at_one_a_minute": statistics.median(stalls[1:]) / 60,
        "seconds_until_durable": seconds["durable"],
        "stop_seconds": stop_seconds,
        "last_step_done": max(json.loads(line)["step"] for line in lines),
        "last_step_saved": int(newest.name[5:]),
        "machine": describe_machine("torch", "safetensors"),
    }


def _train(folder: Path, config_name: str | None, tokenizer: str | None) -> None:
    from llm.trainers.gpt import main as trainer
    from llm.training.checkpoints.async_saver import AsyncSaver

    seconds: dict[str, list[float]] = {"stalls": [], "durable": []}
    save = AsyncSaver.save
    write = AsyncSaver._write

    def timed_save(self: AsyncSaver, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        seconds["stalls"].append(self.stall_seconds[-1])

    def timed_write(self: AsyncSaver, *args: Any, **kwargs: Any) -> None:
        started = time.monotonic()
        write(self, *args, **kwargs)
        seconds["durable"].append(time.monotonic() - started)
        (folder / "stalls.json").write_text(json.dumps(seconds))

    AsyncSaver.save = timed_save  # type: ignore[method-assign]
    AsyncSaver._write = timed_write  # type: ignore[method-assign]
    args = ["--config_name", config_name] if config_name else ["--model_type", "gpt2"]
    if tokenizer:
        args += ["--tokenizer_name", tokenizer]
    args += ["--block_size", "64", "--per_device_train_batch_size", "1", "--save_minutes", "0.5", "--seed", "1"]
    args += ["--max_train_steps", "100000", "--torch_compile", "false", "--logging_steps", "1"]
    args += ["--output_dir", str(folder)]
    sys.exit(trainer(args))


if __name__ == "__main__":
    main()
