"""Number formats that a device supports in hardware."""

from __future__ import annotations

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; False if that cannot be determined.

    Torch's own answer for CPUs and older GPUs includes emulation, which is slower than fp32 by up to two orders of
    magnitude.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return has_units and torch.backends.mkldnn.is_available()
    return False
