"""Format the console lines of a run, one line a record. Their form is an interface: users search them."""

from __future__ import annotations

from typing import Any

from llm.system.units import format_duration, format_quantity

# A smaller share of the time spent waiting for data is not shown: faster data would not make training faster.
_MIN_DATA_WAIT = 0.01
# From here on a perplexity is shown with three significant digits.
_LARGE_PERPLEXITY = 1e6


def training_line(step: int, num_steps: int, record: dict[str, Any], *, eta_seconds: float) -> str:
    """Return `step 120/2000 | loss 3.512 | lr 5.8e-04 | grad_norm 0.91 | 48.2k tok/s | eta 0:12:31`.

    Args:
        step: finished updates.
        num_steps: updates of the run.
        record: the record of metrics.jsonl: `loss` in nats a token (None if no loss was finite), `lr`, `grad_norm`,
            `tokens_per_second`, `data_wait` as a share of the time, `num_skipped`; `mfu` if the peak speed is known.
        eta_seconds: estimated time until the last update.
    """
    parts = [
        f"step {step}/{num_steps}",
        f"loss {record['loss']:.3f}" if record["loss"] is not None else "loss not finite",
        f"lr {record['lr']:.1e}",
        f"grad_norm {record['grad_norm']:.2f}",
        f"{format_quantity(record['tokens_per_second'])} tok/s",
    ]
    if "mfu" in record:
        parts.append(f"mfu {record['mfu']:.1%}")
    if record["data_wait"] > _MIN_DATA_WAIT:
        parts.append(f"data_wait {record['data_wait']:.1%}")
    if record["num_skipped"]:
        parts.append(f"skipped {record['num_skipped']}")
    return " | ".join([*parts, f"eta {format_duration(eta_seconds)}"])


def evaluation_line(step: int, record: dict[str, Any]) -> str:
    """Return `eval step 500 | loss 3.204 | ppl 24.63 | bits/byte 1.402`.

    Args:
        step: finished updates.
        record: the record of metrics.jsonl: `eval_loss` in nats a token, `perplexity`, `bits_per_byte`.
    """
    perplexity = record["perplexity"]
    # A diverged run may have a perplexity of two hundred digits.
    shown = f"{perplexity:.2f}" if perplexity < _LARGE_PERPLEXITY else f"{perplexity:.3g}"
    return f"eval step {step} | loss {record['eval_loss']:.3f} | ppl {shown} | bits/byte {record['bits_per_byte']:.3f}"
