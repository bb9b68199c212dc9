"""The console's lines, one a record."""

from __future__ import annotations

from typing import Any

from llm.system.units import format_duration, format_quantity

# Below that share of the time nobody would train faster with faster data.
_NOTABLE_WAIT = 0.01
_LONG_PERPLEXITY = 1e6


def training_line(step: int, num_steps: int, record: dict[str, Any], *, eta_seconds: float) -> str:
    """Such as `step 120/2000 | loss 3.512 | lr 5.8e-04 | grad_norm 0.91 | 48.2k tok/s | eta 0:12:31`."""
    parts = [
        f"step {step}/{num_steps}",
        f"loss {record['loss']:.3f}" if record["loss"] is not None else "loss not finite",
        f"lr {record['lr']:.1e}",
        f"grad_norm {record['grad_norm']:.2f}",
        f"{format_quantity(record['tokens_per_second'])} tok/s",
    ]
    if "mfu" in record:
        parts.append(f"mfu {record['mfu']:.1%}")
    if record["data_wait"] > _NOTABLE_WAIT:
        parts.append(f"data_wait {record['data_wait']:.1%}")
    if record["num_skipped"]:
        parts.append(f"skipped {record['num_skipped']}")
    return " | ".join([*parts, f"eta {format_duration(eta_seconds)}"])


def evaluation_line(step: int, record: dict[str, Any]) -> str:
    """Such as `eval step 500 | loss 3.204 | ppl 24.63 | bits/byte 1.402`."""
    perplexity = record["perplexity"]
    # Of a run that went astray: two hundred digits would say no more.
    shown = f"{perplexity:.2f}" if perplexity < _LONG_PERPLEXITY else f"{perplexity:.3g}"
    return f"eval step {step} | loss {record['eval_loss']:.3f} | ppl {shown} | bits/byte {record['bits_per_byte']:.3f}"
