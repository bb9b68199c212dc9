"""Time and memory of reading shards: `python -m benchmarks.shards --json OUT`.

Writes 100 million random tokens in 10 shards to a temporary folder, then opens them in a new process and reads random
blocks. The files were just written, so they are in the page cache of the system.

opening_seconds             time from the name of the folder to its blocks
median_block_microseconds   time of reading one block, checked
reading_megabytes           growth of the resident memory of the process since its imports
resident_megabytes          resident memory of the process, of which imports_megabytes belong to the imports
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
    """Measure, print and write the result; with `--folder`, run the measured process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shards", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/shards.json"), help="file of the result")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(read_blocks(options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name))
        command = [sys.executable, "-m", "benchmarks.shards", "--folder", name]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(process.stdout.splitlines()[-1]) | {
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
    """Write random ids, in documents of a thousand tokens, with the writer of `llm.prepare`."""
    from llm.data.shards.format import FOLDER_MAGIC, MANIFEST, SPLITS, VERSION
    from llm.data.shards.writer import ShardSpec, SplitWriter
    from llm.data.sources.documents import Piece

    random = np.random.default_rng(0)
    spec = ShardSpec(VOCABULARY_SIZE, "benchmark", NUM_TOKENS // NUM_SHARDS, None, eos_in_single_text=True)
    writers = {split: SplitWriter(folder, split, spec) for split in SPLITS}
    for _ in range(NUM_TOKENS // _PIECE_TOKENS):
        ids = random.integers(VOCABULARY_SIZE, size=_PIECE_TOKENS, dtype=np.uint32)
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
    """Open the folder, read blocks in the order of an epoch, and return times and memory."""
    from llm.data.batches.blocks import Blocks
    from llm.data.batches.shuffle import shuffled_index
    from llm.data.shards.format import open_folder

    process = psutil.Process()
    imports_bytes = process.memory_info().rss
    start = time.perf_counter()
    streams = open_folder(folder)
    blocks = Blocks(streams.train.tokens, BLOCK_SIZE, vocabulary_size=streams.vocabulary_size)
    opening = time.perf_counter() - start
    seconds = []
    peak_bytes = 0
    for index in range(NUM_BLOCKS_READ):
        start = time.perf_counter()
        ids = blocks[shuffled_index(index, len(blocks), seed=0, epoch=0)].ids
        seconds.append(time.perf_counter() - start)
        if index % 100 == 0:
            peak_bytes = max(peak_bytes, process.memory_info().rss)
    assert ids.shape == (BLOCK_SIZE + 1,) and ids.dtype == np.uint16
    return {
        "opening_seconds": opening,
        "median_block_microseconds": 1e6 * statistics.median(seconds),
        "reading_megabytes": (peak_bytes - imports_bytes) / 1e6,
        "resident_megabytes": peak_bytes / 1e6,
        "imports_megabytes": imports_bytes / 1e6,
    }


if __name__ == "__main__":
    main()
