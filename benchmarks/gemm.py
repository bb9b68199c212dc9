"""The rate of this machine's own matrix products, against which updates are measured."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.gate import Gate

# A device does bf16 natively that is at least so much faster in it than in fp32.
_NATIVE = 1.2
_QUICK_SIZE = 512


def measure_gemm(device_name: str, gate: Gate) -> None:
    """FLOP/s of products in fp32, and in bf16 where that is native; one measurement a request."""
    import torch

    from llm.training.profiling.measure import measured_flops

    device = torch.device(device_name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as the trainer does
    quick = {dtype: _quick_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    native = quick[torch.bfloat16] > _NATIVE * quick[torch.float32]
    gate.facts |= {"bf16_is_native": native, "quick_flops": {str(key)[6:]: rate for key, rate in quick.items()}}
    while True:
        gate.stop_clock()
        rates = {"fp32": measured_flops(device, torch.float32)}
        gate.answer(**rates, **({"bf16": measured_flops(device, torch.bfloat16)} if native else {}))


def _quick_rate(device: Any, dtype: Any) -> float:
    import torch

    size = _QUICK_SIZE if device.type == "cpu" else 8 * _QUICK_SIZE
    left = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(left, left)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
