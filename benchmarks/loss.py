"""Time and memory of output layer and loss, whole, in chunks and by torch: `python -m benchmarks.loss --json OUT`.

Forward and backward pass in fp32, by vocabulary: medians of CPU seconds, measured in turn, and the peak of memory
besides the inputs and their gradients. The vocabulary from which `llm.models.loss` uses chunks is based on this table.
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
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import describe_machine
from llm.models.loss import chunked_loss, loss_of_logits

# Vocabulary size, width, number of rows.
_SHAPES = ((65, 128, 768), (65, 384, 4096), (1024, 384, 4096), (4096, 384, 2048), (8192, 384, 2048), (50257, 768, 4096))

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Loss from all logits at once, as in transformers: [rows, width], [vocab, width], int64 [rows] -> fp32 scalar."""
    return loss_of_logits(F.linear(hidden, weight), targets)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Loss of the trainer, in chunks; shapes and dtypes as `whole`."""
    return chunked_loss(hidden, weight, None, targets)


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Chunked loss of torch with its automatic options; shapes and dtypes as `whole`."""
    options = nn.LinearCrossEntropyOptions()
    loss: Tensor = F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)
    return loss


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/loss.json"), help="file of the result")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for shape in _SHAPES:
        row = measure(*shape, options.rounds if shape[0] < 50000 else 1)
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    result = {
        "command": f"python -m benchmarks.loss --rounds {options.rounds}",
        "unit": "milliseconds of CPU, median; allocated_mb: the most that was allocated at once",
        "machine": describe_machine("torch") | {"threads": torch.get_num_threads()},
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(vocab_size: int, width: int, num_rows: int, rounds: int) -> dict[str, Any]:
    """Return one row of the table: milliseconds and allocated megabytes of each loss."""
    losses: dict[str, Loss] = {"whole": whole, "chunked": chunked}
    if hasattr(nn, "LinearCrossEntropyOptions"):
        losses["torch"] = torch_chunked
    hidden = torch.randn(num_rows, width, requires_grad=True)
    weight = (torch.randn(vocab_size, width) * 0.02).requires_grad_()
    targets = torch.randint(vocab_size, (num_rows,))
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    row: dict[str, Any] = {"vocabulary": vocab_size, "width": width, "rows": num_rows}
    for round_number in range(rounds + 1):
        for name, loss in losses.items():
            hidden.grad = weight.grad = None
            if round_number == 0:
                row[f"{name}_allocated_mb"] = allocated(lambda: loss(hidden, weight, targets).backward())  # noqa: B023
                continue
            start = time.process_time()
            loss(hidden, weight, targets).backward()
            seconds[name].append(time.process_time() - start)
    return row | {f"{name}_ms": round(statistics.median(values) * 1e3, 2) for name, values in seconds.items()}


def allocated(work: Callable[[], object]) -> float:
    """Return the peak, in megabytes, of the memory that `work` allocates and has not yet freed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    highest = 0
    current = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            current += event.nbytes()
            highest = max(highest, current)
    return round(highest / 1e6, 1)


if __name__ == "__main__":
    main()
