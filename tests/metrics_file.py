"""A metrics.jsonl as a run writes it."""

from __future__ import annotations

import json
import math
from pathlib import Path


def write_metrics(path: Path, *, num_steps: int = 200, eval_steps: int = 50, floor: float = 1.5) -> Path:
    """Writes records every 10 updates and evaluations every `eval_steps`; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(10, num_steps + 1, 10):
        loss = floor + 2 * math.exp(-step / 50)
        training = {
            "step": step,
            "loss": loss,
            "lr": 1e-3 * (1 - step / num_steps),
            "grad_norm": 1.0,
        }
        lines.append(training | {"tokens": step * 512, "tokens_per_second": 1e4})
        if step % eval_steps == 0:
            evaluation = {"step": step, "eval_loss": loss + 0.1, "perplexity": math.exp(loss + 0.1)}
            lines.append(evaluation | {"bits_per_byte": 1.5})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
