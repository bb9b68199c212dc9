"""Durations on the time line of a device."""

from __future__ import annotations

import time

import pytest
import torch

from llm.system.device_timer import DeviceTimer

GPU = torch.accelerator.is_available()


def test_seconds_when_on_a_cpu_then_is_wall_time_between_the_marks() -> None:
    timer = DeviceTimer(torch.device("cpu"))
    before = time.perf_counter()
    begin = timer.record()
    time.sleep(0.02)
    end = timer.record()
    timer.wait()
    assert 0.02 <= timer.seconds(begin, end) <= time.perf_counter() - before


def test_seconds_when_on_an_accelerator_then_converts_from_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """Stands for `torch.Event`; the n-th recorded one lies 250 ms behind the one before it."""

        num_recorded = 0

        def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
            assert device.type == "cuda" and enable_timing

        def record(self) -> None:
            self.number = Event.num_recorded
            Event.num_recorded += 1

        def elapsed_time(self, end: Event) -> float:
            return 250.0 * (end.number - self.number)

    monkeypatch.setattr(torch, "Event", Event)
    timer = DeviceTimer(torch.device("cuda"))
    first, _, third = (timer.record() for _ in range(3))
    assert timer.seconds(first, third) == 0.5


@pytest.mark.skipif(not GPU, reason="needs an accelerator")
def test_seconds_when_the_device_computes_then_counts_its_time() -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    timer = DeviceTimer(device)
    matrix = torch.randn(2048, 2048, device=device)
    timer.wait()
    before = time.perf_counter()
    begin = timer.record()
    for _ in range(20):
        matrix @ matrix
    end = timer.record()
    timer.wait()
    assert 0 < timer.seconds(begin, end) < time.perf_counter() - before
