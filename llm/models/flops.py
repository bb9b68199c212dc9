"""How much arithmetic a model needs for a token, and how much a device can do in a second."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_HALF = (torch.bfloat16, torch.float16)

# Dense peaks of one device in 1e12 FLOP/s: (bf16 and fp16, fp32 as TF32, fp32); the first match
# counts. Source: the makers' data sheets and architecture papers, without sparsity; AMD's MI200
# cards show themselves as two devices, so half a card stands here, and its fp32 is that of the
# matrix units.
_PEAKS: tuple[tuple[str, float, float, float], ...] = (
    (r"\bB200\b", 2250.0, 1125.0, 75.0),
    (r"\bH200\b.*NVL", 835.0, 417.5, 60.0),
    (r"\bGH200\b|\bH200\b", 989.0, 494.7, 67.0),
    (r"\bH100\b.*PCIe", 756.0, 378.0, 51.0),
    (r"\bH100\b.*NVL", 835.0, 417.5, 60.0),
    (r"\bH100\b", 989.0, 494.7, 67.0),
    (r"\bA100\b", 312.0, 156.0, 19.5),
    (r"\bA40\b", 149.7, 74.8, 37.4),
    (r"\bA30\b", 165.0, 82.0, 10.3),
    (r"\bA10\b", 125.0, 62.5, 31.2),
    (r"\bL40S\b", 362.0, 183.0, 91.6),
    (r"\bL40\b", 181.0, 90.5, 90.5),
    (r"\bL4\b", 121.0, 60.0, 30.3),
    (r"\bV100\b.*PCIE", 112.0, 14.0, 14.0),
    (r"\bV100\b", 125.0, 15.7, 15.7),
    (r"\bT4\b", 65.0, 8.1, 8.1),
    (r"\bRTX A6000\b", 154.8, 77.4, 38.7),
    (r"\bRTX 3090\b", 71.0, 35.6, 35.6),
    (r"\bRTX 4090\b", 165.2, 82.6, 82.6),
    (r"\bRTX 5090\b", 209.5, 104.8, 104.8),
    (r"\bMI300X\b", 1307.4, 163.4, 163.4),
    (r"\bMI250X\b", 191.5, 47.9, 47.9),
    (r"\bMI250\b|\bMI210\b", 181.0, 45.3, 45.3),
    (r"\bMI100\b", 184.6, 46.1, 46.1),
)


def num_parameters(model: nn.Module) -> int:
    """Parameters of the model, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: PreTrainedModel, block_size: int) -> float:
    """FLOPs of a forward and backward pass for one token: 6 N + 12 L H Q T.

    N leaves out what is only looked up (token and position embeddings) and holds the head, also
    where it is tied to the embeddings; L layers, H heads of Q numbers, T tokens a block. Recomputed
    activations do not count. All experts of a mixture count, although a token meets only some.

    Source: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B.
    """
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head: Any = model.get_output_embeddings()
    looked_up = sum(table.numel() for table in tables.values())
    if head is not None and id(head.weight) in tables:
        looked_up -= head.weight.numel()
    config = model.config.get_text_config(decoder=True)
    num_heads = getattr(config, "num_attention_heads", None) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // num_heads if num_heads else 0)
    attention = 12 * config.num_hidden_layers * num_heads * width * block_size
    return float(6 * (num_parameters(model) - looked_up) + attention)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of a CUDA or ROCm device in FLOP/s for products in `dtype`; None when unknown.

    Of float32 that of TF32, where torch may take it: `torch.set_float32_matmul_precision`.
    """
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_of_name(torch.cuda.get_device_name(device), dtype, tf32=tf32)


def peak_of_name(name: str, dtype: torch.dtype, *, tf32: bool) -> float | None:
    """`peak_flops` of a device's name, such as ``NVIDIA A100-SXM4-40GB``; `tf32` is about float32 alone."""
    for pattern, half, short, single in _PEAKS:
        if re.search(pattern, name, re.IGNORECASE):
            if dtype in _HALF:
                return half * 1e12
            return (short if tf32 else single) * 1e12 if dtype == torch.float32 else None
    return None
