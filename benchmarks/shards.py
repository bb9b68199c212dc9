"""Reading shards: `python -m benchmarks.shards --json OUT`.

Writes 100 million random tokens in 10 shards to a temporary folder, then opens them in a fresh process and reads
random blocks. The files were just written, so that they lie in the system's cache.

opening_seconds             from the folder's name to blocks
median_block_microseconds   of one block, checked and as int64
reading_megabytes           by how much the resident memory of that process grew from behind the imports
resident_megabytes          all of it; imports_megabytes of that are the imports'
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

NUM_TOKENS = 100_000_000
NUM_SHARDS = 10
NUM_BLOCKS_READ = 20_000
BLOCK_SIZE = 1024
VOCABULARY_SIZE = 50_257
_PIECE_TOKENS = 1_000_000
_DOCUMENT_TOKENS = 1000


def main() -> None:
    """Measures, prints and writes the result; with `--folder`, is the measured process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shards", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/shards.json"), help="the result")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(read_blocks(options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name))
        command = [sys.executable, "-m", "benchmarks.shards", "--folder", name]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(found.stdout.splitlines()[-1]) | {
        "num_tokens": NUM_TOKENS,
        "num_shards": NUM_SHARDS,
        "num_blocks_read": NUM_BLOCKS_READ,
        "block_size": BLOCK_SIZE,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def write_shards(folder: Path) -> None:
    """Random ids in documents of a thousand, through the writer that `llm.prepare` uses."""
    from llm.data.shards.format import FOLDER_MAGIC, MANIFEST, SPLITS, VERSION
    from llm.data.shards.writer import ShardSpec, SplitWriter
    from llm.data.sources.documents import Piece

    draw = np.random.default_rng(0)
    spec = ShardSpec(VOCABULARY_SIZE, "benchmark", NUM_TOKENS // NUM_SHARDS, None, eos_in_single_text=True)
    writers = {split: SplitWriter(folder, split, spec) for split in SPLITS}
    for _ in range(NUM_TOKENS // _PIECE_TOKENS):
        ids = draw.integers(VOCABULARY_SIZE, size=_PIECE_TOKENS, dtype=np.uint32)
        for document in np.split(ids, _PIECE_TOKENS // _DOCUMENT_TOKENS):
            writers["train"].add(Piece("train", "some text", begins=True, ends=True), document)
        writers["train"].flush()
    for writer in writers.values():
        writer.finish()
    manifest = {
        "magic": FOLDER_MAGIC,
        "version": VERSION,
        "name": "random",
        "data_hash": "benchmark",
        "tokenizer_hash": spec.tokenizer_hash,
        "vocabulary_size": VOCABULARY_SIZE,
        "splits": {split: writer.facts for split, writer in writers.items()},
        "skipped": {},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def read_blocks(folder: Path) -> dict[str, Any]:
    """Opens the folder and reads blocks in the order of an epoch."""
    from llm.data.batches.blocks import Blocks
    from llm.data.batches.shuffle import shuffled_index
    from llm.data.shards.format import open_folder

    process = psutil.Process()
    imports = process.memory_info().rss
    start = time.perf_counter()
    streams = open_folder(folder)
    blocks = Blocks(streams.train.tokens, BLOCK_SIZE, vocabulary_size=streams.vocabulary_size)
    opening = time.perf_counter() - start
    seconds = []
    most = 0
    for place in range(NUM_BLOCKS_READ):
        begun = time.perf_counter()
        ids = blocks[shuffled_index(place, len(blocks), seed=0, epoch=0)].ids
        seconds.append(time.perf_counter() - begun)
        if place % 100 == 0:
            most = max(most, process.memory_info().rss)
    assert ids.shape == (BLOCK_SIZE + 1,) and ids.dtype == np.uint16
    return {
        "opening_seconds": opening,
        "median_block_microseconds": 1e6 * statistics.median(seconds),
        "reading_megabytes": (most - imports) / 1e6,
        "resident_megabytes": most / 1e6,
        "imports_megabytes": imports / 1e6,
    }


if __name__ == "__main__":
    main()
