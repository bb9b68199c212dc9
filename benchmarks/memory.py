"""Peak memory of a step, computed without running it: `python -m benchmarks.memory --json OUT`.

GPT-2 124M with 4 x 1,024 tokens, computed with torch's fake tensors, which have shapes but no values. This takes about
a minute and needs neither a large machine nor native bf16. `benchmarks.throughput` measures the memory of real
processes, which includes programs, fragments of the allocator and workspaces of matrix products.

plain   GPT2LMHeadModel of transformers with its own loss, as the loop of run_clm calls it
ours    the same model as the trainer changes it, not compiled

peak_bytes   peak over two steps of parameters, gradients, AdamW's state and activations, by kind
ratio        ours divided by plain
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.machine import describe_machine
from benchmarks.throughput import SIZES
from llm.models import language_model
from llm.models.activations import fuse_gelu
from llm.models.attention import use_causal_attention

_VARIANTS = ("plain", "ours")
_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class PlainLoss(nn.Module):
    """A model with the loss of transformers, from all logits at once."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss twice, fp32 scalar; ids and targets: int64 [batch, block]. run_clm passes ids only."""
        loss: Tensor = self.model(input_ids=ids, labels=targets).loss
        return loss, loss


def main() -> None:
    """Compute, print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/memory.json"), help="file of the result")
    parser.add_argument("--size", choices=tuple(SIZES), default="124M")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    for dtype in _DTYPES:
        rows[dtype] = {variant: peak(options.size, variant, dtype) for variant in _VARIANTS}
        ours = sum(rows[dtype]["ours"].values())
        plain = sum(rows[dtype]["plain"].values())
        rows[dtype]["ratio"] = ours / plain
        print(
            f"{dtype}: plain {plain / 2**20:,.0f} MiB, ours {ours / 2**20:,.0f} MiB, ratio {ours / plain:.2f}",
            flush=True,
        )
    result = {"size": options.size, "peak_bytes": rows, "machine": describe_machine("torch", "transformers")}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.json}")


def peak(size_name: str, variant: str, dtype: str) -> dict[str, int]:
    """Return the bytes at the peak of a step by kind: parameters, gradients, activations, ..."""
    size = SIZES[size_name]
    autocast_dtype = _DTYPES[dtype]
    tracker = MemTracker()
    # GPT-2 has a linear lm_head. The check of that needs values, which fake tensors do not have.
    skipped_check = mock.patch.object(language_model, "has_linear_lm_head", return_value=True)
    with FakeTensorMode(), skipped_check:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size.vocabulary, n_positions=size.block, n_embd=size.width, n_layer=size.layers,
                n_head=size.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
        trained = PlainLoss(model) if variant == "plain" else _ours(model)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        tracker.track_external(model, optimizer)
        ids = torch.zeros(size.batch, size.block, dtype=torch.int64)
        with tracker:
            for _ in range(2):  # AdamW has its state from the second step on
                with nullcontext() if autocast_dtype is None else torch.autocast("cpu", autocast_dtype):
                    loss = trained(ids, ids)[0]
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {
        str(getattr(kind, "value", kind)).lower(): number
        for kind, number in snapshot.items()
        if kind != "Total" and number
    }


def _ours(model: GPT2LMHeadModel) -> nn.Module:
    fuse_gelu(model)
    use_causal_attention(model)
    return language_model.LanguageModel(model)


if __name__ == "__main__":
    main()
