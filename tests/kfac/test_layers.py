"""Which layers are preconditioned, and the reasons for the others."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import PreTrainedModel

from llm.kfac import KFACPreconditioner


def test_layers_when_gpt2_then_its_matrices_are_preconditioned_and_the_rest_has_a_reason(
    tiny_gpt2: PreTrainedModel,
) -> None:
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


def test_layers_when_the_output_layer_is_not_tied_then_it_is_preconditioned(tiny_gpt2: PreTrainedModel) -> None:
    head = tiny_gpt2.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    assert KFACPreconditioner(tiny_gpt2).report().layers["lm_head"] == (257, 32)


def test_layers_when_skipped_then_by_name_weight_and_size() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "big": nn.Linear(3, 50), "c": nn.Linear(3, 3)})
    model["b"].weight.requires_grad_(False)
    report = KFACPreconditioner(model, skip_layers=["^a$"], max_factor_dim=49).report()
    assert list(report.layers) == ["c"]
    assert report.skipped == {
        "a": "skip_layers matches it (^a$)",
        "b": "its weight is frozen",
        "big": "a factor of 50 rows is above max_factor_dim = 49",
    }


def test_layers_when_a_bias_is_frozen_then_it_is_not_in_the_factor() -> None:
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
def test_layers_when_none_is_left_then_the_error_names_the_reasons(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KFACPreconditioner(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4)), **arguments)


def test_layers_when_sharded_then_are_refused() -> None:
    class FullyShardedDataParallel(nn.Sequential):
        pass

    with pytest.raises(ValueError, match="whole weights, which FSDP shards"):
        KFACPreconditioner(FullyShardedDataParallel(nn.Linear(3, 3)))
    layer = nn.Linear(3, 3)
    layer.weight.device_mesh = object()  # as of a DTensor
    with pytest.raises(ValueError, match="its weight is sharded"):
        KFACPreconditioner(layer)
