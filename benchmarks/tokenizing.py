"""Text to tokens, run_clm's way and ours: `python -m benchmarks.tokenizing --text FILE… --tokenizer DIR --json OUT`.

All take the same text from a file, one after the other in every round, each in a process of its own.

ratio                  CPU seconds, children included, of run_clm's way by those of ours; imports and reading the
                       rows into Arrow (run_clm's) are not counted
speedup_of_2_workers   wall seconds from the text file to shards on the disk with one worker by those with two, the
                       start of the workers included, imports not: of medians, by text size, since the start (the
                       faster engine is made and tried) is a second that a short text feels
same_by_same           the same quotient of one worker by one worker: how far noise alone takes it from 1
peak_megabytes         resident memory of all processes together at its highest, ten times a second, by text size
                       and workers; what the imports take is in it
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
_LETTERS_CHANGED = 0.01
_CHECKED_CHARACTERS = 4_000_000
# By megabytes of text.
_SCALING_ROUNDS = {50: 5, 200: 3}
_MEMORY_MEGABYTES = (20, 200)
_SECONDS_BETWEEN_SAMPLES = 0.1


def main() -> None:
    """Measures, prints and writes the result; with `--way`, is one of the measured processes."""
    options = _parser().parse_args()
    if options.way == "run_clm":
        print(json.dumps(measure_run_clm(options.text[0], options.tokenizer)))
        return
    if options.way == "llm":
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
        sys.exit("the ids differ from the tokenizer's")


def compare(path: Path, size: int, tokenizer: Path, rounds: int) -> dict[str, Any]:
    """run_clm's way and ours, in turn."""
    found: dict[str, list[dict[str, Any]]] = {"run_clm": [], "llm": []}
    for number in range(rounds):
        for name, clocks in found.items():
            clocks.append(_measured(name, path, tokenizer, check=True))
            print(f"round {number + 1}, {name}: {clocks[-1]}", flush=True)
    seconds = {name: _median(clocks, "cpu_seconds") for name, clocks in found.items()}
    return {
        "ratio": seconds["run_clm"] / seconds["llm"],
        "megabytes_per_cpu_second": {name: size / 1e6 / seconds[name] for name in found},
        "ids_are_equal": all(measured["ids_are_equal"] for measured in found["llm"]),
        "rounds": found,
        "block_size": BLOCK_SIZE,
    }


def scale(sources: list[Path], path: Path, tokenizer: Path) -> dict[str, Any]:
    """One worker, two workers, one worker again, in turn."""
    result: dict[str, dict[str, Any]] = {"speedup_of_2_workers": {}, "same_by_same": {}, "scaling": {}}
    for megabytes, num_rounds in _SCALING_ROUNDS.items():
        write_text(sources, path, megabytes)
        found: dict[str, list[dict[str, Any]]] = {"1": [], "2": [], "1 again": []}
        for number in range(num_rounds):
            for name, clocks in found.items():
                clocks.append(_measured("llm", path, tokenizer, workers=int(name[0])))
                print(f"{megabytes} MB, round {number + 1}, workers {name}: {clocks[-1]}", flush=True)
        seconds = {name: _median(clocks, "wall_seconds") for name, clocks in found.items()}
        size = f"{megabytes} MB"
        result["speedup_of_2_workers"][size] = seconds["1"] / seconds["2"]
        result["same_by_same"][size] = seconds["1"] / seconds["1 again"]
        result["scaling"][size] = found
    return result


def measure_memory(sources: list[Path], path: Path, tokenizer: Path) -> dict[str, Any]:
    """The peak of a short text and of one ten times as long, by one and two workers."""
    peaks: dict[str, dict[str, float]] = {}
    for megabytes in _MEMORY_MEGABYTES:
        write_text(sources, path, megabytes)
        peaks[f"{megabytes} MB"] = {}
        for workers in (1, 2):
            measured = _measured("llm", path, tokenizer, workers=workers)
            peaks[f"{megabytes} MB"][f"{workers} workers"] = measured["peak_megabytes"]
            print(f"{megabytes} MB, {workers} workers: {measured}", flush=True)
    return {"peak_megabytes": peaks}


def _median(clocks: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(measured[key] for measured in clocks))


def write_text(sources: list[Path], path: Path, megabytes: float) -> int:
    """Writes the texts again and again, one letter in a hundred changed each time, and says how many bytes."""
    draw = np.random.default_rng(0)
    points = np.frombuffer("".join(source.read_text() for source in sources).encode("utf-32-le"), "<u4")
    letters = np.flatnonzero((points >= ord("a")) & (points <= ord("z")))
    size = 0
    with path.open("wb") as file:
        while size < megabytes * 1e6:
            changed = points.copy()
            if size:
                places = letters[draw.random(letters.size) < _LETTERS_CHANGED]
                changed[places] = draw.integers(ord("a"), ord("z") + 1, places.size)
            size += file.write(changed.tobytes().decode("utf-32-le").encode())
    return size


def measure_run_clm(path: Path, tokenizer_dir: Path) -> dict[str, Any]:
    """Every line of the file a row; rows to ids, then ids of 1,000 rows to blocks, both stored by `datasets`."""
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
    """The file to token files through `llm.data`, hashes, fsync and all; then a look at the ids, if asked for."""
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
        found = {**clock.read(), "num_tokens": len(streams.train.tokens)}
        if not check:
            return found
        with path.open(encoding="utf-8", newline="") as file:
            expected = tokenizer(file.read(_CHECKED_CHARACTERS), add_special_tokens=False, verbose=False)["input_ids"]
        # Where the text was cut for the check, the last ids may differ.
        equal = np.array_equal(streams.train.tokens[: len(expected) - 100], expected[:-100])
        return {**found, "ids_are_equal": bool(equal)}


class _Clock:
    def __init__(self) -> None:
        self._cpu, self._wall = _cpu_seconds(), time.perf_counter()

    def read(self) -> dict[str, float]:
        return {"cpu_seconds": _cpu_seconds() - self._cpu, "wall_seconds": time.perf_counter() - self._wall}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _measured(way: str, path: Path, tokenizer: Path, *, workers: int = 1, check: bool = False) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.tokenizing", "--way", way, "--workers", str(workers)]
    command += ["--check"] if check else []
    # One thread each, so that waiting threads do not count; no Hub.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with subprocess.Popen(
        [*command, "--text", str(path), "--tokenizer", str(tokenizer)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **quiet},
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
        sys.exit(f"{way} failed")
    return {**json.loads(printed.splitlines()[-1]), "peak_megabytes": peak / 1e6}


def _resident_bytes(pid: int) -> int:
    """Of a process and of all that it started."""
    total = 0
    try:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += each.memory_info().rss
    except psutil.Error:
        pass
    return total


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizing", description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tokenizing.json"), help="the result")
    parser.add_argument("--megabytes", type=float, default=50, help="how much text is made of the files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=("run_clm", "llm"), help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
