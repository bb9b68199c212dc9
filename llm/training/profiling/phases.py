"""Where the time of an update goes, by marks that the model's and the optimizer's own hooks set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llm.system.device_timer import DeviceTimer, Mark

# In the order of an update; what is left over is clipping, the finite check and the reading of the loss.
PHASES = ("forward", "backward", "optimizer")


class Span(NamedTuple):
    """A piece of one phase."""

    phase: str
    begin: Mark
    end: Mark


class StepTimer:
    """Spans of the phases while `attached`; they are read when the device has passed them."""

    def __init__(self, timer: DeviceTimer) -> None:
        self._timer = timer
        self._spans: list[Span] = []
        self._begin: Mark | None = None
        self._last_gradient: Mark | None = None

    @contextmanager
    def attached(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
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
        self._timer.wait()
        total = dict.fromkeys(PHASES, 0.0)
        for phase, begin, end in self._spans:
            total[phase] += self._timer.seconds(begin, end)
        return total

    def _enter(self, *_: object) -> None:
        self._end_backward()
        self._begin = self._timer.record()

    def _leave_forward(self, module: nn.Module, given: Any, result: tuple[Tensor, Tensor]) -> None:
        assert self._begin is not None
        end = self._timer.record()
        self._spans.append(Span("forward", self._begin, end))
        self._begin = end

    def _note_gradient(self, _: Tensor) -> None:
        self._last_gradient = self._timer.record()

    def _end_backward(self) -> None:
        """A backward pass ends with the last gradient that it left."""
        if self._last_gradient is not None:
            assert self._begin is not None
            self._spans.append(Span("backward", self._begin, self._last_gradient))
            self._last_gradient = None

    def _enter_step(self, *_: object) -> None:
        self._end_backward()
        self._begin = self._timer.record()

    def _leave_step(self, *_: object) -> None:
        assert self._begin is not None
        self._spans.append(Span("optimizer", self._begin, self._timer.record()))
