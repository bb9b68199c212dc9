"""A metrics.jsonl like that of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path


def write_metrics(path: Path, *, num_steps: int = 200, eval_steps: int = 50, floor: float = 1.5) -> Path:
    """Write a record every 10 steps and an evaluation every `eval_steps`, and return the path.

    The loss decays from `floor` + 2 towards `floor`; `eval_loss` is 0.1 above it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    records = []
    for step in range(10, num_steps + 1, 10):
        loss = floor + 2 * math.exp(-step / 50)
        training = {
            "step": step,
            "loss": loss,
            "lr": 1e-3 * (1 - step / num_steps),
            "grad_norm": 1.0,
            "tokens": step * 512,
            "tokens_per_second": 1e4,
        }
        records.append(training)
        if step % eval_steps == 0:
            evaluation = {
                "step": step,
                "eval_loss": loss + 0.1,
                "perplexity": math.exp(loss + 0.1),
                "bits_per_byte": 1.5,
            }
            records.append(evaluation)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
