"""Spans of the phases of an update."""

from __future__ import annotations

import torch

from llm.system.device_timer import DeviceTimer, Mark
from llm.training.profiling.phases import StepTimer


class TickTimer(DeviceTimer):
    """A timer whose every mark is one second after the mark before it."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.now = 0.0

    def record(self) -> Mark:
        self.now += 1
        return self.now


def small_model() -> torch.nn.Module:
    """A model with two parameters; `model(rows)` returns a loss and the number of rows."""
    layer = torch.nn.Linear(64, 64)
    model = torch.nn.Module()
    model.layer = layer
    model.forward = lambda rows: (layer(rows).square().sum(), torch.tensor(len(rows)))  # type: ignore[method-assign]
    return model


def test_step_timer_when_attached_then_every_pass_is_recorded_once() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step_timer = StepTimer(DeviceTimer(torch.device("cpu")))
    with step_timer.attached(model, optimizer):
        for _ in range(2):
            for _ in range(3):
                model(torch.randn(8, 64))[0].backward()
            optimizer.step()
    seconds = step_timer.seconds()
    assert [span.phase for span in step_timer._spans] == (["forward", "backward"] * 3 + ["optimizer"]) * 2
    assert all(value > 0 for value in seconds.values())
    model(torch.randn(8, 64))
    assert step_timer.seconds() == seconds  # the hooks are removed


def test_step_timer_when_marks_are_a_second_apart_then_the_phases_last_this_long() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step_timer = StepTimer(TickTimer())
    with step_timer.attached(model, optimizer):
        for _ in range(3):
            model(torch.randn(8, 64))[0].backward()
        optimizer.step()
    # A backward pass records a mark for each of the two gradients, and ends with the second.
    assert step_timer.seconds() == {"forward": 3.0, "backward": 6.0, "optimizer": 1.0}
