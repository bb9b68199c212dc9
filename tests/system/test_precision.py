"""Which devices multiply bf16 natively."""

from __future__ import annotations

import pytest
import torch

from llm.system.precision import multiplies_bf16


@pytest.mark.parametrize(
    ("avx512", "amx", "mkldnn", "expected"),
    [
        (False, False, True, False),
        (True, False, True, True),
        (False, True, True, True),
        (True, True, False, False),
    ],
)
def test_multiplies_bf16_when_on_a_cpu_then_needs_hardware_units_and_kernels(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, mkldnn: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    assert multiplies_bf16(torch.device("cpu")) is expected


def test_multiplies_bf16_when_on_a_gpu_then_emulation_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: list[bool] = []

    def supported(including_emulation: bool = True) -> bool:
        arguments.append(including_emulation)
        return True

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert multiplies_bf16(torch.device("cuda"))
    assert arguments == [False]


def test_multiplies_bf16_when_the_device_type_is_unknown_then_is_false() -> None:
    assert not multiplies_bf16(torch.device("mps"))
    assert not multiplies_bf16(torch.device("meta"))
