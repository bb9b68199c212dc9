"""Tokenization by run_clm and by llm: `python -m benchmarks.tokenizing --text FILE… --tokenizer DIR --json OUT`.

All measured processes read the same text from a file, one after the other in every round.

ratio                  CPU seconds of run_clm, child processes included, divided by those of llm; without imports, and
                       without reading the rows into Arrow (run_clm)
speedup_of_2_workers   wall seconds from the text file to shards on the disk with one worker, divided by those with
                       two; with the start of the workers, without imports; ratio of medians, by text size: the start
                       (building and checking the faster encoder) takes a second, which matters for a short text
same_by_same           the same ratio of one worker to one worker: the effect of noise alone
peak_megabytes         peak of the resident memory of all processes together, sampled ten times a second, by text size
                       and workers; it includes the memory of the imports
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import describe_machine

BLOCK_SIZE = 1024
_SHARE_OF_CHANGED_LETTERS = 0.01
_CHECKED_CHARACTERS = 4_000_000
# Number of rounds, by megabytes of text.
_SCALING_ROUNDS = {50: 5, 200: 3}
_MEMORY_MEGABYTES = (20, 200)
_SECONDS_BETWEEN_SAMPLES = 0.1


def main() -> None:
    """Measure, print and write the result; with `--variant`, run one of the measured processes."""
    options = _parser().parse_args()
    if options.variant == "run_clm":
        print(json.dumps(measure_run_clm(options.text[0], options.tokenizer)))
        return
    if options.variant == "llm":
        print(json.dumps(measure_llm(options.text[0], options.tokenizer, options.workers, check=options.check)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        size = write_text(options.text, path, options.megabytes)
        result = {"text_bytes": size, **compare(path, size, options.tokenizer, options.rounds)}
        result |= scale(options.text, path, options.tokenizer)
        result |= measure_memory(options.text, path, options.tokenizer)
    result["machine"] = describe_machine("tokenizers", "transformers", "tiktoken", "datasets", "numpy")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"ratio {result['ratio']:.2f}")
    for name in ("speedup_of_2_workers", "same_by_same"):
        print(name, {size: round(value, 2) for size, value in result[name].items()})
    print(f"peak_megabytes {result['peak_megabytes']}; written to {options.json}")
    if not result["ids_are_equal"]:
        sys.exit("the ids of llm differ from those of the tokenizer")


def compare(path: Path, size: int, tokenizer: Path, rounds: int) -> dict[str, Any]:
    """Measure run_clm and llm in turn; return their ratio and whether the ids are equal."""
    measured: dict[str, list[dict[str, Any]]] = {"run_clm": [], "llm": []}
    for number in range(rounds):
        for name, clocks in measured.items():
            clocks.append(_measure(name, path, tokenizer, check=True))
            print(f"round {number + 1}, {name}: {clocks[-1]}", flush=True)
    seconds = {name: _median(clocks, "cpu_seconds") for name, clocks in measured.items()}
    return {
        "ratio": seconds["run_clm"] / seconds["llm"],
        "megabytes_per_cpu_second": {name: size / 1e6 / seconds[name] for name in measured},
        "ids_are_equal": all(clocks["ids_are_equal"] for clocks in measured["llm"]),
        "rounds": measured,
        "block_size": BLOCK_SIZE,
    }


def scale(sources: list[Path], path: Path, tokenizer: Path) -> dict[str, Any]:
    """Measure one worker, two workers and one worker again, in turn, for each size of text."""
    result: dict[str, dict[str, Any]] = {"speedup_of_2_workers": {}, "same_by_same": {}, "scaling": {}}
    for megabytes, num_rounds in _SCALING_ROUNDS.items():
        write_text(sources, path, megabytes)
        measured: dict[str, list[dict[str, Any]]] = {"1": [], "2": [], "1 again": []}
        for number in range(num_rounds):
            for name, clocks in measured.items():
                clocks.append(_measure("llm", path, tokenizer, workers=int(name[0])))
                print(f"{megabytes} MB, round {number + 1}, workers {name}: {clocks[-1]}", flush=True)
        seconds = {name: _median(clocks, "wall_seconds") for name, clocks in measured.items()}
        size = f"{megabytes} MB"
        result["speedup_of_2_workers"][size] = seconds["1"] / seconds["2"]
        result["same_by_same"][size] = seconds["1"] / seconds["1 again"]
        result["scaling"][size] = measured
    return result


def measure_memory(sources: list[Path], path: Path, tokenizer: Path) -> dict[str, Any]:
    """Measure the peak of memory for a short text and one ten times as long, with one and two workers."""
    peaks: dict[str, dict[str, float]] = {}
    for megabytes in _MEMORY_MEGABYTES:
        write_text(sources, path, megabytes)
        peaks[f"{megabytes} MB"] = {}
        for workers in (1, 2):
            clocks = _measure("llm", path, tokenizer, workers=workers)
            peaks[f"{megabytes} MB"][f"{workers} workers"] = clocks["peak_megabytes"]
            print(f"{megabytes} MB, {workers} workers: {clocks}", flush=True)
    return {"peak_megabytes": peaks}


def _median(clocks: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(values[key] for values in clocks))


def write_text(sources: list[Path], path: Path, megabytes: float) -> int:
    """Write the texts repeatedly, with one letter in a hundred changed each time; return the number of bytes."""
    random = np.random.default_rng(0)
    points = np.frombuffer("".join(source.read_text() for source in sources).encode("utf-32-le"), "<u4")
    letters = np.flatnonzero((points >= ord("a")) & (points <= ord("z")))
    size = 0
    with path.open("wb") as file:
        while size < megabytes * 1e6:
            changed = points.copy()
            if size:
                indices = letters[random.random(letters.size) < _SHARE_OF_CHANGED_LETTERS]
                changed[indices] = random.integers(ord("a"), ord("z") + 1, indices.size)
            size += file.write(changed.tobytes().decode("utf-32-le").encode())
    return size


def measure_run_clm(path: Path, tokenizer_dir: Path) -> dict[str, Any]:
    """Measure run_clm: each line is a row; `datasets` stores the ids of the rows, then the blocks of 1,000 rows."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    with tempfile.TemporaryDirectory() as cache:
        rows = load_dataset("text", data_files=str(path), keep_linebreaks=True, split="train", cache_dir=cache)

        def encode(batch: dict[str, list[str]]) -> Any:
            return tokenizer(batch["text"])

        def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
            joined = {name: list(chain.from_iterable(lists)) for name, lists in batch.items()}
            end = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
            blocks = {
                name: [values[start : start + BLOCK_SIZE] for start in range(0, end, BLOCK_SIZE)]
                for name, values in joined.items()
            }
            blocks["labels"] = [list(block) for block in blocks["input_ids"]]
            return blocks

        clock = _Clock()
        packed = rows.map(encode, batched=True, remove_columns=["text"]).map(pack, batched=True)
        return {**clock.read(), "num_tokens": len(packed) * BLOCK_SIZE}


def measure_llm(path: Path, tokenizer_dir: Path, workers: int, *, check: bool) -> dict[str, Any]:
    """Measure llm: from the file to token files, hashes and fsync included; with `check`, compare the ids."""
    from transformers import AutoTokenizer

    from llm.config.options import DataOptions
    from llm.data.preparation.cache import load_or_tokenize
    from llm.data.sources.corpus import open_corpus

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    with tempfile.TemporaryDirectory() as cache:
        clock = _Clock()
        options = DataOptions(train_file=(str(path),), validation_split_percentage=0, preprocessing_num_workers=workers)
        streams = load_or_tokenize(
            open_corpus(options), tokenizer, tokenizer_hash="benchmark", options=options, cache_dir=Path(cache)
        )
        result = {**clock.read(), "num_tokens": len(streams.train.tokens)}
        if not check:
            return result
        with path.open(encoding="utf-8", newline="") as file:
            expected = tokenizer(file.read(_CHECKED_CHARACTERS), add_special_tokens=False, verbose=False)["input_ids"]
        # The last ids may differ, because the text was cut for the check.
        is_equal = np.array_equal(streams.train.tokens[: len(expected) - 100], expected[:-100])
        return {**result, "ids_are_equal": bool(is_equal)}


class _Clock:
    def __init__(self) -> None:
        self._cpu = _cpu_seconds()
        self._wall = time.perf_counter()

    def read(self) -> dict[str, float]:
        return {"cpu_seconds": _cpu_seconds() - self._cpu, "wall_seconds": time.perf_counter() - self._wall}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _measure(variant: str, path: Path, tokenizer: Path, *, workers: int = 1, check: bool = False) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.tokenizing", "--variant", variant, "--workers", str(workers)]
    if check:
        command.append("--check")
    # One thread per process, so that CPU time does not include waiting threads; no Hub.
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with subprocess.Popen(
        [*command, "--text", str(path), "--tokenizer", str(tokenizer)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident_bytes(process.pid))
            time.sleep(_SECONDS_BETWEEN_SAMPLES)
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode:
        sys.exit(f"{variant}: the measured process failed with exit code {process.returncode}")
    return {**json.loads(printed.splitlines()[-1]), "peak_megabytes": peak / 1e6}


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants."""
    total = 0
    try:
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += member.memory_info().rss
    except psutil.Error:
        pass
    return total


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizing", description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/tokenizing.json"), help="file of the result"
    )
    parser.add_argument("--megabytes", type=float, default=50, help="size of the text that is made from the files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", choices=("run_clm", "llm"), help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
