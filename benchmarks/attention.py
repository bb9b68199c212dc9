"""Time of causal attention, forward and backward, by kernel: `python -m benchmarks.attention --json OUT`.

Full blocks in the shapes of 4 x 128, 6 x 384 and 12 x 768; medians of CPU seconds, measured in turn. The choice that
`llm.models.attention` makes on a CPU is based on this table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.machine import describe_machine
from llm.models.attention import query_chunked_attention
from llm.system.allocator import keep_freed_memory

_TOKENS = 4096
# Number of heads, and the width of a head.
_SHAPES = {"4x128": (4, 32), "6x384": (6, 64), "12x768": (12, 64)}
_BLOCKS = (64, 128, 256, 512, 1024)

Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Torch's SDPA: query, key, value [batch, heads, block, width] -> [batch, block, heads, width], in one dtype."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout).transpose(1, 2)


def eager(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Attention of all pairs, like the eager attention of transformers; shapes and dtype as `sdpa`."""
    length = query.shape[2]
    future = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + future
    return (F.dropout(scores.softmax(-1), dropout) @ value).transpose(1, 2)


def chunked(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Attention of llm, in chunks that skip later keys; shapes and dtype as `sdpa`."""
    return query_chunked_attention(query, key, value, dropout, None)


def recomputed(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """As `chunked`, with recomputed instead of stored attention weights; shapes and dtype as `sdpa`."""
    output: Tensor = checkpoint(query_chunked_attention, query, key, value, dropout, None, use_reentrant=False)
    return output


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/attention.json"), help="file of the result"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    keep_freed_memory()  # as the trainer does
    rows = []
    for dropout in options.dropout:
        for shape in _SHAPES:
            for block in _BLOCKS:
                row = measure(shape, block, dtype, dropout, options.rounds)
                rows.append(row)
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    result = {
        "command": f"python -m benchmarks.attention --dtype {options.dtype} --rounds {options.rounds}",
        "unit": "milliseconds of CPU, median, forward and backward of about 4,096 tokens in one layer",
        "machine": describe_machine("torch") | {"threads": torch.get_num_threads()},
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(shape: str, block: int, dtype: torch.dtype, dropout: float, rounds: int) -> dict[str, Any]:
    """Return one row of the table: milliseconds by kernel."""
    kernels: dict[str, Kernel] = {"sdpa": sdpa, "eager": eager, "by_rows": chunked, "by_rows_again": recomputed}
    heads, width = _SHAPES[shape]
    batch = _TOKENS // block
    joined = torch.randn(batch, block, 3 * heads * width, dtype=dtype, requires_grad=True)
    grad_output = torch.randn(batch, block, heads, width, dtype=dtype)
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(rounds + 1):
        for name, kernel in kernels.items():
            joined.grad = None
            start = time.process_time()
            projections = joined.split(heads * width, 2)
            query, key, value = (p.view(batch, block, heads, width).transpose(1, 2) for p in projections)
            kernel(query, key, value, dropout).backward(grad_output)
            seconds[name].append(time.process_time() - start)
    medians = {name: round(statistics.median(values[1:]) * 1e3, 1) for name, values in seconds.items()}
    return {"shape": shape, "block": block, "dropout": dropout, **medians}


if __name__ == "__main__":
    main()
