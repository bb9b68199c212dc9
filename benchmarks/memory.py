"""The most memory of an update, computed without computing the update: `python -m benchmarks.memory --json OUT`.

GPT-2 124M with 4 x 1,024 tokens, by torch's fake tensors, which have shapes and no numbers, so that arithmetic costs
nothing: neither a large machine nor one that multiplies bf16 is needed, and about a minute. `benchmarks.throughput`
measures the same of real processes, which hold programs, an allocator's pieces and a GEMM's room besides.

plain   transformers' GPT2LMHeadModel with its own loss, as run_clm's loop calls it
ours    what the trainer makes of it, not compiled

peak_bytes   of parameters, gradients, AdamW's state and activations, over two updates: by what it is
ratio        ours by plain
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

_WAYS = ("plain", "ours")
_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class PlainLoss(nn.Module):
    """All logits, and the loss of transformers."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss; run_clm gives no more than the ids."""
        loss: Tensor = self.model(input_ids=ids, labels=targets).loss
        return loss, loss


def main() -> None:
    """Computes, prints and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/memory.json"), help="the result")
    parser.add_argument("--size", choices=tuple(SIZES), default="124M")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    for dtype in _DTYPES:
        rows[dtype] = {way: peak(options.size, way, dtype) for way in _WAYS}
        ours, plain = (sum(rows[dtype][way].values()) for way in ("ours", "plain"))
        rows[dtype]["ratio"] = ours / plain
        print(
            f"{dtype}: plain {plain / 2**20:,.0f} MiB, ours {ours / 2**20:,.0f}, {ours / plain:.2f} of it", flush=True
        )
    result = {"size": options.size, "peak_bytes": rows, "machine": describe_machine("torch", "transformers")}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.json}")


def peak(size_name: str, way: str, dtype: str) -> dict[str, int]:
    """Bytes at the update's highest point, by what they are: parameters, gradients, activations, ..."""
    size, half = SIZES[size_name], _DTYPES[dtype]
    tracker = MemTracker()
    # Of a GPT-2 it is known, and telling needs numbers.
    plain_head = mock.patch.object(language_model, "has_linear_lm_head", return_value=True)
    with FakeTensorMode(), plain_head:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size.vocabulary, n_positions=size.block, n_embd=size.width, n_layer=size.layers,
                n_head=size.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
        trained = PlainLoss(model) if way == "plain" else _ours(model)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        tracker.track_external(model, optimizer)
        ids = torch.zeros(size.batch, size.block, dtype=torch.int64)
        with tracker:
            for _ in range(2):  # AdamW's state is there from the second on
                with nullcontext() if half is None else torch.autocast("cpu", half):
                    loss = trained(ids, ids)[0]
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
    found = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {
        str(getattr(kind, "value", kind)).lower(): number
        for kind, number in found.items()
        if kind != "Total" and number
    }


def _ours(model: GPT2LMHeadModel) -> nn.Module:
    fuse_gelu(model)
    use_causal_attention(model)
    return language_model.LanguageModel(model)


if __name__ == "__main__":
    main()
