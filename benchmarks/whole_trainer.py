"""The whole trainer against its bare update: what records, trackers and everything beside the update cost."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gate import Program
from benchmarks.programs import trainer_words
from benchmarks.settings import Setting

# As the trainer's --logging_steps by itself.
_UPDATES_A_RECORD = 10
_SECONDS_BETWEEN_LOOKS = 0.02


def measure_whole_trainer(
    bare: Program, setting: Setting, folder: Path, environment: dict[str, str], *, num_updates: int, rounds: int
) -> dict[str, Any]:
    """The trainer as a command, and the bare update, in turn; of both the same number of updates counts.

    The trainer compiles if the bare update is compiled; by itself it would choose by the length of the run.
    """
    compiles = ("--torch_compile", str(bare.first["compiled"]).lower())
    tokens = setting.micro_batch * setting.block_size
    counted = num_updates // _UPDATES_A_RECORD * _UPDATES_A_RECORD - _UPDATES_A_RECORD
    found: dict[str, list[float]] = {"whole": [], "bare": []}
    for number in range(rounds):
        output_dir = folder / f"run_{number}"
        found["whole"].append(
            counted * tokens / _seconds_of_trainer(setting, output_dir, environment, num_updates, compiles)
        )
        found["bare"].append(counted * tokens / bare.ask(counted)["wall_seconds"])
        print(f"round {number + 1}, tok/s: " + ", ".join(f"{key} {each[-1]:.0f}" for key, each in found.items()))
    speeds = {name: statistics.median(each) for name, each in found.items()}
    return {
        "whole_by_bare": speeds["whole"] / speeds["bare"],
        "whole_tokens_per_second": speeds["whole"],
        "bare_tokens_per_second": speeds["bare"],
        "num_updates": counted,
        "rounds": found,
    }


def _seconds_of_trainer(
    setting: Setting, output_dir: Path, environment: dict[str, str], num_updates: int, compiles: Sequence[str]
) -> float:
    """From the arrival of its first record to that of its last."""
    words = [
        *(*trainer_words(setting), "--train_dir", setting.data_dir, "--tokenizer_name", setting.start_dir),
        *("--validation_split_percentage", "0", "--save_minutes", "0", "--max_train_steps", str(num_updates)),
        *("--output_dir", str(output_dir), *compiles),
    ]
    arrivals: list[float] = []
    with subprocess.Popen(
        [sys.executable, "-m", "llm.trainers.gpt", *words],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None:
            arrivals += [time.perf_counter()] * (_num_records(output_dir) - len(arrivals))
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        assert process.stderr is not None
        if process.returncode:
            sys.exit(f"the trainer ended with code {process.returncode}:\n{process.stderr.read()}")
    if len(arrivals) != num_updates // _UPDATES_A_RECORD:
        sys.exit(f"the trainer left {len(arrivals)} records of {num_updates} updates: was it run with other defaults?")
    return arrivals[-1] - arrivals[0]


def _num_records(output_dir: Path) -> int:
    metrics = output_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0
