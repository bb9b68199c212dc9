"""Counts of parameters and FLOPs, and peaks of devices."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llm.models.flops import flops_per_token, num_parameters, peak_flops, peak_of_name


def test_num_parameters_when_gpt2_then_is_the_published_number() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert num_parameters(model) == 124_439_808


def test_flops_when_gpt2_then_is_the_closed_form(tiny_gpt2: PreTrainedModel) -> None:
    d, layers, vocab, block = 32, 2, 257, 64
    per_layer = (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 4 * d
    weights = layers * per_layer + 2 * d + vocab * d
    assert flops_per_token(tiny_gpt2, block) == 6 * weights + 12 * layers * d * block


def test_flops_when_lm_head_is_not_tied_then_embeddings_are_not_counted() -> None:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    expected = 6 * (num_parameters(model) - 100 * 16) + 12 * 1 * 16 * 8
    assert flops_per_token(model, 8) == expected


@pytest.mark.parametrize(
    ("name", "half_peak", "tf32_peak", "fp32_peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12, 156e12, 19.5e12),
        ("NVIDIA A10", 125e12, 62.5e12, 31.2e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 494.7e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12, 51e12),
        ("NVIDIA H200", 989e12, 494.7e12, 67e12),
        ("NVIDIA H200 NVL", 835e12, 417.5e12, 60e12),
        ("Tesla V100-SXM2-16GB", 125e12, 15.7e12, 15.7e12),
        ("NVIDIA L4", 121e12, 60e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 183e12, 91.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 82.6e12),
        ("AMD Instinct MI250X", 191.5e12, 47.9e12, 47.9e12),
        ("NVIDIA A10G", None, None, None),
        ("Some Device", None, None, None),
    ],
)
def test_peak_when_device_is_known_then_is_the_value_of_its_data_sheet(
    name: str, half_peak: float | None, tf32_peak: float | None, fp32_peak: float | None
) -> None:
    for tf32, float32_peak in ((True, tf32_peak), (False, fp32_peak)):
        assert peak_of_name(name, torch.bfloat16, tf32=tf32) == half_peak
        assert peak_of_name(name, torch.float32, tf32=tf32) == float32_peak


def test_peak_when_cpu_then_is_unknown() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) is None
