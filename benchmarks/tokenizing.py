"""Text to tokens, run_clm's way and ours: `python -m benchmarks.tokenizing --text FILE… --tokenizer DIR --json OUT`.

Both ways take the same text from a file, one after the other in every round, each in a process of its own.
What counts is CPU seconds, children included, imports and reading the rows into Arrow (run_clm's) not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

BLOCK_SIZE = 1024
_LETTERS_CHANGED = 0.01
_CHECKED_CHARACTERS = 4_000_000
_SCALING_CHARACTERS = 16_000_000
_SCALING_REPEATS = 5


def main() -> None:
    """Measures, prints and writes the result; with `--way`, is one of the measured processes."""
    options = _parser().parse_args()
    if options.way:
        way = {"run_clm": measure_run_clm, "llm": measure_llm, "scaling": measure_scaling}[options.way]
        print(json.dumps(way(options.text[0], options.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        size = write_text(options.text, path, options.megabytes)
        result = compare(path, size, options.tokenizer, options.rounds)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"ratio {result['ratio']:.2f}, 2 workers {result['speedup_of_2_workers']:.2f}x; written to {options.json}")
    if not result["ids_are_equal"]:
        sys.exit("the ids differ from the tokenizer's")


def compare(path: Path, size: int, tokenizer: Path, rounds: int) -> dict[str, Any]:
    """The rounds, and what follows from them."""
    ways = ("run_clm", "llm")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in ways:
            found[name].append(_measured(name, path, tokenizer))
            print(f"round {number + 1}, {name}: {found[name][-1]}", flush=True)

    scaling = _measured("scaling", path, tokenizer)
    # Of wall times on a machine that others use too, the least is the truest.
    best = {workers: min(clock["wall_seconds"] for clock in clocks) for workers, clocks in scaling.items()}

    def median(name: str, key: str) -> float:
        return float(statistics.median(measured[key] for measured in found[name]))

    return {
        "ratio": median("run_clm", "cpu_seconds") / median("llm", "cpu_seconds"),
        "speedup_of_2_workers": best["1"] / best["2"],
        "megabytes_per_cpu_second": {name: size / 1e6 / median(name, "cpu_seconds") for name in ways},
        "ids_are_equal": all(measured["ids_are_equal"] for measured in found["llm"]),
        "text_bytes": size,
        "rounds": found,
        "scaling": scaling,
        "block_size": BLOCK_SIZE,
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "load": os.getloadavg(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("tokenizers", "transformers", "tiktoken", "datasets", "numpy")},
        },
    }


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


def measure_llm(path: Path, tokenizer_dir: Path) -> dict[str, Any]:
    """The file to token files through `llm.data`, hashes, fsync and all; then a look at the ids."""
    from transformers import AutoTokenizer

    from llm.config.options import DataOptions
    from llm.data.corpus import open_corpus
    from llm.data.streams import tokenize

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    with tempfile.TemporaryDirectory() as cache:
        clock = _Clock()
        options = DataOptions(train_file=(str(path),), validation_split_percentage=0, preprocessing_num_workers=1)
        streams = tokenize(
            open_corpus(options), tokenizer, tokenizer_hash="benchmark", options=options, cache_dir=Path(cache)
        )
        found = clock.read()
        with path.open(encoding="utf-8", newline="") as file:
            expected = tokenizer(file.read(_CHECKED_CHARACTERS), add_special_tokens=False, verbose=False)["input_ids"]
        # Where the text was cut for the check, the last ids may differ.
        equal = np.array_equal(streams.train.tokens[: len(expected) - 100], expected[:-100])
        return {**found, "num_tokens": len(streams.train.tokens), "ids_are_equal": bool(equal)}


def measure_scaling(path: Path, tokenizer_dir: Path) -> dict[str, Any]:
    """Text in memory to ids in memory, by one and by two workers in turn, several times."""
    from transformers import AutoTokenizer

    from llm.data.encoding import Encoder, batches
    from llm.data.held_out import Split
    from llm.data.parts import Part

    encoder = Encoder(AutoTokenizer.from_pretrained(tokenizer_dir))
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read(_SCALING_CHARACTERS)
    encoder.encode([text[: 1 << 21]])  # Making and trying the engine is not what the workers share.
    parts: list[tuple[Split, Part]] = [
        ("train", Part(text[start : start + (1 << 20)], ends=False)) for start in range(0, len(text), 1 << 20)
    ]
    found: dict[str, list[dict[str, float]]] = {"1": [], "2": []}
    for _ in range(_SCALING_REPEATS):
        for workers, clocks in found.items():
            clock = _Clock()
            for _ in encoder.encode_batches(batches(parts, encoder), int(workers)):
                pass
            clocks.append(clock.read())
    return found


class _Clock:
    def __init__(self) -> None:
        self._cpu, self._wall = _cpu_seconds(), time.perf_counter()

    def read(self) -> dict[str, float]:
        return {"cpu_seconds": _cpu_seconds() - self._cpu, "wall_seconds": time.perf_counter() - self._wall}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _measured(way: str, path: Path, tokenizer: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.tokenizing", "--way", way]
    # One thread each, so that waiting threads do not count; no Hub.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [*command, "--text", str(path), "--tokenizer", str(tokenizer)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **quiet},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizing", description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tokenizing.json"), help="the result")
    parser.add_argument("--megabytes", type=float, default=50, help="how much text is made of the files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=("run_clm", "llm", "scaling"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
