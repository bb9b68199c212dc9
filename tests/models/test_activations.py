"""The fused tanh GELU: the same function in every model, eager and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, activations

from llm.models.activations import TanhGELU, fuse_gelu


def model_of(activation_function: str) -> PreTrainedModel:
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    config.activation_function = activation_function
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh"])
def test_fuse_gelu_when_tanh_gelu_has_any_name_then_computes_the_same(name: str) -> None:
    model = model_of(name)
    x = torch.linspace(-6, 6, 1001).requires_grad_()
    expected = activations.ACT2FN[name](x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    assert fuse_gelu(model) == 2
    result = model.transformer.h[0].mlp.act(x)
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(result.sum(), x)[0], gradient, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["gelu", "gelu_10", "relu", "silu"])
def test_fuse_gelu_when_activation_is_another_function_then_keeps_it(name: str) -> None:
    model = model_of(name)
    before = type(model.transformer.h[0].mlp.act)
    assert fuse_gelu(model) == 0
    assert type(model.transformer.h[0].mlp.act) is before


def test_tanh_gelu_when_compiled_for_a_cpu_then_has_no_tanh_and_computes_the_same() -> None:
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    module = nn.Sequential(TanhGELU())
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64).requires_grad_()
    expected = module(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    torch.compiler.reset()
    result = torch.compile(module, backend=backend)(x)
    assert torch.allclose(result, expected, rtol=0, atol=1e-14)
    assert torch.allclose(torch.autograd.grad(result.sum(), x)[0], gradient, rtol=0, atol=1e-14)
    assert len(graphs) == 1
    assert "sigmoid" in graphs[0] and "gelu" not in graphs[0]
