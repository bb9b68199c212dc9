"""The rate of matrix products on this machine, to which the rates of steps are compared."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.gate import Gate

# bf16 counts as native if its products are at least this many times as fast as those in fp32.
_NATIVE_SPEEDUP = 1.2
# Width of the matrices for that decision; eight times as wide on an accelerator.
_QUICK_SIZE = 512


def measure_gemm(device_name: str, gate: Gate) -> None:
    """Report FLOP/s of matrix products in fp32, and in bf16 if that is native; one measurement per request."""
    import torch

    from llm.training.profiling.measure import measured_flops

    device = torch.device(device_name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as the trainer does
    quick = {dtype: _quick_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    is_native = quick[torch.bfloat16] > _NATIVE_SPEEDUP * quick[torch.float32]
    gate.facts |= {"bf16_is_native": is_native, "quick_flops": {str(key)[6:]: rate for key, rate in quick.items()}}
    while True:
        gate.stop_clock()
        rates = {"fp32": measured_flops(device, torch.float32)}
        if is_native:
            rates["bf16"] = measured_flops(device, torch.bfloat16)
        gate.report(rates)


def _quick_rate(device: Any, dtype: Any) -> float:
    """FLOP/s of the fastest of three products."""
    import torch

    size = _QUICK_SIZE if device.type == "cpu" else 8 * _QUICK_SIZE
    left = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(left, left)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
