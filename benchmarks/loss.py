"""Head and cross entropy, whole and by chunks, and torch's own: `python -m benchmarks.loss --json OUT`.

Forward and backward in fp32 by vocabulary: CPU seconds (interleaved, medians), and the peak of memory beside the
inputs and their gradients. Where `llm.models.loss` begins to cut rests on this table.
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

# Vocabulary, width, rows.
_SHAPES = ((65, 128, 768), (65, 384, 4096), (1024, 384, 4096), (4096, 384, 2048), (8192, 384, 2048), (50257, 768, 4096))

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What transformers does: all logits at once."""
    return loss_of_logits(F.linear(hidden, weight), targets)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What is trained with."""
    return chunked_loss(hidden, weight, None, targets)


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Torch's own, with its automatic options."""
    options = nn.LinearCrossEntropyOptions()
    loss: Tensor = F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)
    return loss


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/loss.json"), help="the result")
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


def measure(vocabulary: int, width: int, num_rows: int, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    losses: dict[str, Loss] = {"whole": whole, "chunked": chunked}
    if hasattr(nn, "LinearCrossEntropyOptions"):
        losses["torch"] = torch_chunked
    hidden = torch.randn(num_rows, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) * 0.02).requires_grad_()
    targets = torch.randint(vocabulary, (num_rows,))
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    row: dict[str, Any] = {"vocabulary": vocabulary, "width": width, "rows": num_rows}
    for turn in range(rounds + 1):
        for name, loss in losses.items():
            hidden.grad = weight.grad = None
            if turn == 0:
                row[f"{name}_allocated_mb"] = allocated(lambda: loss(hidden, weight, targets).backward())  # noqa: B023
                continue
            begun = time.process_time()
            loss(hidden, weight, targets).backward()
            seconds[name].append(time.process_time() - begun)
    return row | {f"{name}_ms": round(statistics.median(each) * 1e3, 2) for name, each in seconds.items()}


def allocated(work: Callable[[], None]) -> float:
    """Megabytes: the highest sum of what was allocated and not yet freed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    highest, now = 0, 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return round(highest / 1e6, 1)


if __name__ == "__main__":
    main()
