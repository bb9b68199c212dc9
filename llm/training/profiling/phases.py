"""Time of each phase of an update, from marks that hooks of the model and the optimizer record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llm.system.device_timer import DeviceTimer, Mark

# In the order of an update. The rest of an update is clipping, the check for finite gradients and reading the loss.
PHASES = ("forward", "backward", "optimizer")


class Span(NamedTuple):
    """The time between two marks that belongs to one phase.

    Attributes:
        phase: one of `PHASES`.
        begin: mark at its beginning.
        end: mark at its end.
    """

    phase: str
    begin: Mark
    end: Mark


class StepTimer:
    """Records the spans of all phases while it is `attached`; the times are read after the device has finished.

    Args:
        timer: of the device that the model is on.
    """

    def __init__(self, timer: DeviceTimer) -> None:
        self._timer = timer
        self._spans: list[Span] = []
        self._begin: Mark | None = None
        self._last_gradient: Mark | None = None

    @contextmanager
    def attached(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Record every forward pass, backward pass and optimizer step while the block runs.

        Args:
            model: the module whose forward pass is recorded.
            optimizer: of the module's parameters.
        """
        with ExitStack() as stack:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            hooks = [
                model.register_forward_pre_hook(self._begin_forward),
                model.register_forward_hook(self._end_forward),
                optimizer.register_step_pre_hook(self._begin_step),
                optimizer.register_step_post_hook(self._end_step),
                *(p.register_post_accumulate_grad_hook(self._record_gradient) for p in parameters),
            ]
            for hook in hooks:
                stack.callback(hook.remove)
            yield
            self._end_backward()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, summed over all its spans; wait for the device."""
        self._timer.wait()
        total = dict.fromkeys(PHASES, 0.0)
        for phase, begin, end in self._spans:
            total[phase] += self._timer.seconds(begin, end)
        return total

    def _begin_forward(self, *_: object) -> None:
        self._end_backward()
        self._begin = self._timer.record()

    def _end_forward(self, *_: object) -> None:
        assert self._begin is not None
        end = self._timer.record()
        self._spans.append(Span("forward", self._begin, end))
        self._begin = end

    def _record_gradient(self, _: Tensor) -> None:
        self._last_gradient = self._timer.record()

    def _end_backward(self) -> None:
        """Add the span of a backward pass, which ends with its last accumulated gradient."""
        if self._last_gradient is not None:
            assert self._begin is not None
            self._spans.append(Span("backward", self._begin, self._last_gradient))
            self._last_gradient = None

    def _begin_step(self, *_: object) -> None:
        self._end_backward()
        self._begin = self._timer.record()

    def _end_step(self, *_: object) -> None:
        assert self._begin is not None
        self._spans.append(Span("optimizer", self._begin, self._timer.record()))
