"""Where the time of an update goes, by marks that the model's and the optimizer's own hooks set."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# In the order of an update; what is left over is clipping, the finite check and the reading of the loss.
PHASES = ("forward", "backward", "optimizer")

Mark = float | torch.Event


class Span(NamedTuple):
    """A piece of one phase."""

    phase: str
    begin: Mark
    end: Mark


class DeviceTimer:
    """Marks on the device's own time line, which do not make it wait.

    Args:
        device: where the updates are made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        """Now, for the work that was given to the device so far."""
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Mark, end: Mark) -> float:
        """From one mark to another; the device must have passed both."""
        if isinstance(begin, float) and isinstance(end, float):
            return end - begin
        assert isinstance(begin, torch.Event) and isinstance(end, torch.Event)
        return float(begin.elapsed_time(end)) / 1e3

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


class StepTimer:
    """Spans of the phases while `watching`; they are read when the device has passed them."""

    def __init__(self, clock: DeviceTimer) -> None:
        self._clock = clock
        self._spans: list[Span] = []
        self._begin: Mark | None = None
        self._last_gradient: Mark | None = None

    @contextmanager
    def watching(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Marks every forward pass, backward pass and step while the block runs.

        Args:
            model: a module whose `forward` gives the loss first.
            optimizer: of its parameters.
        """
        with ExitStack() as stack:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            hooks = [
                model.register_forward_pre_hook(self._enter),
                model.register_forward_hook(self._leave_forward),
                optimizer.register_step_pre_hook(self._enter_step),
                optimizer.register_step_post_hook(self._leave_step),
                *(p.register_post_accumulate_grad_hook(self._note_gradient) for p in parameters),
            ]
            for hook in hooks:
                stack.callback(hook.remove)
            yield
            self._end_backward()

    def seconds(self) -> dict[str, float]:
        """Of each phase, summed over all its spans."""
        self._clock.wait()
        total = dict.fromkeys(PHASES, 0.0)
        for phase, begin, end in self._spans:
            total[phase] += self._clock.seconds(begin, end)
        return total

    def _enter(self, *_: object) -> None:
        self._end_backward()
        self._begin = self._clock.mark()

    def _leave_forward(self, module: nn.Module, given: Any, result: tuple[Tensor, Tensor]) -> None:
        assert self._begin is not None
        end = self._clock.mark()
        self._spans.append(Span("forward", self._begin, end))
        self._begin = end

    def _note_gradient(self, _: Tensor) -> None:
        self._last_gradient = self._clock.mark()

    def _end_backward(self) -> None:
        """A backward pass ends with the last gradient that it left."""
        if self._last_gradient is not None:
            assert self._begin is not None
            self._spans.append(Span("backward", self._begin, self._last_gradient))
            self._last_gradient = None

    def _enter_step(self, *_: object) -> None:
        self._end_backward()
        self._begin = self._clock.mark()

    def _leave_step(self, *_: object) -> None:
        assert self._begin is not None
        self._spans.append(Span("optimizer", self._begin, self._clock.mark()))
