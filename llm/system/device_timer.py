"""Durations of work on a device, measured without waiting for the device between two marks."""

from __future__ import annotations

import time

import torch

# Seconds of the monotonic clock on a CPU; an event in the device's queue elsewhere.
Mark = float | torch.Event


class DeviceTimer:
    """Records marks on the time line of a device; recording does not synchronise with the device.

    Args:
        device: the device whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self) -> Mark:
        """Record a mark behind the work that has been submitted to the device so far."""
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Return the seconds between two marks; the device must have passed both (see `wait`)."""
        if isinstance(begin, float) and isinstance(end, float):
            return end - begin
        assert isinstance(begin, torch.Event) and isinstance(end, torch.Event)
        return float(begin.elapsed_time(end)) / 1e3

    def wait(self) -> None:
        """Wait until the device has finished all work that was submitted to it."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
