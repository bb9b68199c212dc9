"""FLOPs that a model needs per token, and the peak FLOP/s of devices."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_HALF = (torch.bfloat16, torch.float16)

# (pattern of the device name, then dense peaks of one device in 1e12 FLOP/s: bf16 and fp16, fp32 as TF32, fp32). The
# first pattern that matches counts. Source: data sheets and architecture papers of the manufacturers, without
# sparsity. An MI200 card of AMD appears as two devices, so its values are those of half a card, and its fp32 value is
# that of the matrix units.
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
    """Return the number of parameters of the model; tied parameters are counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: PreTrainedModel, block_size: int) -> float:
    """Return the FLOPs of a forward and backward pass per token: 6 N + 12 L H Q T.

    N is the number of parameters without those that are only looked up (token and position embeddings). It includes
    the output layer, also when that is tied to the embeddings. L is the number of layers, H the number of heads, Q
    the width of a head, T the block size in tokens. Recomputed activations are not counted. All experts of a mixture
    are counted, although a token uses only some of them.

    Source: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B.
    """
    embeddings = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    lm_head: Any = model.get_output_embeddings()
    num_looked_up = sum(weight.numel() for weight in embeddings.values())
    if lm_head is not None and id(lm_head.weight) in embeddings:
        num_looked_up -= lm_head.weight.numel()
    config = model.config.get_text_config(decoder=True)
    num_heads = getattr(config, "num_attention_heads", None) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // num_heads if num_heads else 0)
    attention = 12 * config.num_hidden_layers * num_heads * width * block_size
    return float(6 * (num_parameters(model) - num_looked_up) + attention)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the dense peak, in FLOP/s, of a CUDA or ROCm device for matrix products in `dtype`; None if unknown.

    For float32 this is the peak of TF32 if `torch.set_float32_matmul_precision` allows TF32.
    """
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_of_name(torch.cuda.get_device_name(device), dtype, tf32=tf32)


def peak_of_name(name: str, dtype: torch.dtype, *, tf32: bool) -> float | None:
    """Return the dense peak, in FLOP/s, of the device with this name; None if the name or the dtype is unknown.

    Args:
        name: device name as torch reports it, such as ``NVIDIA A100-SXM4-40GB``.
        dtype: dtype of the matrix products: bf16, fp16 or fp32.
        tf32: whether float32 products use TF32; ignored for other dtypes.
    """
    for pattern, half_peak, tf32_peak, fp32_peak in _PEAKS:
        if re.search(pattern, name, re.IGNORECASE):
            if dtype in _HALF:
                return half_peak * 1e12
            if dtype == torch.float32:
                return (tf32_peak if tf32 else fp32_peak) * 1e12
            return None
    return None
