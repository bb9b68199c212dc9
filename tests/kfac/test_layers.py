"""Which layers are taken, and what is said of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from llm.kfac import KFACPreconditioner


def test_layers_when_gpt2_then_its_matrices_are_taken_and_the_rest_has_a_reason(tiny_gpt2: PreTrainedModel) -> None:
    report = KFACPreconditioner(tiny_gpt2).report()
    sizes = {"attn.c_attn": (96, 33), "attn.c_proj": (32, 33), "mlp.c_fc": (128, 33), "mlp.c_proj": (32, 129)}
    assert report.layers == {f"transformer.h.{i}.{name}": size for i in range(2) for name, size in sizes.items()}
    assert report.skipped["lm_head"] == "its weight is shared with transformer.wte"
    assert report.skipped["transformer.wte"] == "Embedding is not a linear layer"
    assert report.skipped["transformer.h.0.ln_1"] == "LayerNorm is not a linear layer"
    # wte, wpe, ln_f, lm_head and two norms a block
    assert len(report.skipped) == 8
    lines = str(report).splitlines()
    assert lines[0].startswith("K-FAC on 8 of 16 modules with weights: ")
    assert "  left to the optimizer: lm_head: its weight is shared with transformer.wte" in lines


def test_layers_when_the_head_is_not_tied_then_it_is_taken(tiny_gpt2: PreTrainedModel) -> None:
    head = tiny_gpt2.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    assert KFACPreconditioner(tiny_gpt2).report().layers["lm_head"] == (257, 32)


def test_layers_when_left_out_on_demand_then_by_name_class_and_size() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "big": nn.Linear(3, 50), "c": nn.Linear(3, 3)})
    model["b"].weight.requires_grad_(False)
    report = KFACPreconditioner(model, skip_layers=["^a$"], max_factor_dim=49).report()
    assert list(report.layers) == ["c"]
    assert report.skipped == {
        "a": "skip_layers matches it (^a$)",
        "b": "its weight is frozen",
        "big": "a factor of 50 rows is above max_factor_dim = 49",
    }


def test_layers_when_a_bias_is_frozen_then_it_has_no_part_in_the_factor() -> None:
    layer = nn.Linear(3, 4)
    layer.bias.requires_grad_(False)
    assert KFACPreconditioner(layer).report().layers == {"": (4, 3)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"skip_layers": ["Linear"]}, r"^K-FAC has no layer to precondition: 0 and 1 more: skip_layers matches it"),
        ({"max_factor_dim": 2}, "0 and 1 more: a factor of 4 rows is above max_factor_dim = 2"),
    ],
)
def test_layers_when_none_is_left_then_the_error_says_why(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KFACPreconditioner(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4)), **arguments)


def test_layers_when_sharded_then_are_refused_with_the_reason() -> None:
    class FullyShardedDataParallel(nn.Sequential):
        pass

    with pytest.raises(ValueError, match="whole weights, which FSDP shards"):
        KFACPreconditioner(FullyShardedDataParallel(nn.Linear(3, 3)))
    layer = nn.Linear(3, 3)
    layer.weight.device_mesh = object()  # as a DTensor has it
    with pytest.raises(ValueError, match="its weight is sharded"):
        KFACPreconditioner(layer)


def test_report_when_made_then_its_bytes_are_those_of_the_state() -> None:
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 5, bias=False))
    for method in ("eigen", "inverse"):
        kfac = KFACPreconditioner(model, method=method)
        report, state = kfac.report(), kfac.state_dict()
        kept = sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))
        assert report.factor_bytes == 4 * sum(n * (n + 1) // 2 for n in (10, 8, 8, 5))
        assert report.factor_bytes + report.inverse_bytes == kept
        assert report.capture_bytes == report.factor_bytes
        kfac.close()


def test_report_when_factors_or_inverses_are_rarer_then_the_cost_falls(tiny_gpt2: PreTrainedModel) -> None:
    costs = []
    for arguments in (
        {"factor_update_steps": 1},
        {},
        {"method": "inverse"},
        {"method": "inverse", "factor_tokens": 64},
    ):
        kfac = KFACPreconditioner(tiny_gpt2, **arguments)  # type: ignore[arg-type]
        costs.append(kfac.report().cost(4096))
        kfac.close()
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)


def test_training_when_preconditioned_then_the_loss_falls_faster(
    tiny_gpt2: PreTrainedModel, byte_tokenizer: Any, tiny_text: Path
) -> None:
    ids = torch.tensor(byte_tokenizer(tiny_text.read_text()[:20000])["input_ids"])
    blocks = ids[: len(ids) // 33 * 33].view(-1, 33)
    start = {name: tensor.clone() for name, tensor in tiny_gpt2.state_dict().items()}
    reached = []
    for is_on in (False, True):
        tiny_gpt2.load_state_dict(start)
        optimizer = torch.optim.AdamW(tiny_gpt2.parameters(), lr=1e-2)
        kfac = KFACPreconditioner(tiny_gpt2, factor_update_steps=1) if is_on else None
        draw = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(30):
            batch = blocks[torch.randint(len(blocks), (8,), generator=draw)]
            logits = tiny_gpt2(batch[:, :-1]).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            if kfac is not None:
                kfac.step()
            nn.utils.clip_grad_norm_(tiny_gpt2.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        reached.append(sum(losses[-5:]) / 5)
    plain, preconditioned = reached
    assert preconditioned < plain - 0.5
