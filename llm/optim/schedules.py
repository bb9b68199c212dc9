"""The learning rate as a pure function of the step."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from llm.config.errors import UsageError, first_line
from llm.config.options import ScheduleOptions

log = logging.getLogger(__name__)

# Arguments that `build_schedule` passes itself.
_OWN_ARGUMENTS = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}

# Schedules whose functions take arguments that HF never passes to them.
_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")


def build_schedule(options: ScheduleOptions, num_steps: int, *, learning_rate: float) -> Callable[[int], float]:
    """Return the function from step k, 0 <= k < num_steps, to the factor on the peak rate.

    At k = num_steps, after the last step, the factor is the end of the schedule: 0, or its floor. `cosine` with
    `min_lr_ratio` is HF's cosine_with_min_lr.

    Source: the formulas of transformers (`transformers.get_scheduler`).

    Args:
        options: of the schedule.
        num_steps: steps of the whole run.
        learning_rate: the peak; arguments such as `lr_end` are rates, not shares of the peak.

    Raises:
        UsageError: an argument is unknown to this schedule, missing, or has an invalid value.
    """
    name = options.lr_scheduler_type
    arguments = dict(options.lr_scheduler_kwargs)
    if options.min_lr_ratio is not None:
        name = "cosine_with_min_lr"
        arguments.setdefault("min_lr_rate", options.min_lr_ratio)
    _refuse_unknown(name, arguments)
    if options.num_warmup_steps > num_steps:
        log.warning(
            "--num_warmup_steps %d: the run has only %d steps and never reaches its peak learning rate",
            options.num_warmup_steps,
            num_steps,
        )
    stand_in = SGD([torch.zeros(1)], lr=learning_rate)
    try:
        scheduler = get_scheduler(
            name,
            stand_in,
            num_warmup_steps=options.num_warmup_steps,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=arguments,
        )
        factor: Callable[[int], float] = scheduler.lr_lambdas[0]
        for step in {0, min(options.num_warmup_steps, num_steps), num_steps}:
            if not math.isfinite(factor(step)):
                raise ValueError(f"the factor of step {step} is {factor(step)}")
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UsageError(f"--lr_scheduler_type {options.lr_scheduler_type}: {_cause(error)}{_allowed(name)}") from error
    return lambda step: float(factor(step))


def _refuse_unknown(name: str, arguments: dict[str, Any]) -> None:
    unknown = sorted(set(arguments) - set(_argument_names(name)))
    if unknown:
        raise UsageError(f"--lr_scheduler_kwargs {', '.join(unknown)}: not an argument of {name}{_allowed(name)}")


def _argument_names(name: str) -> list[str]:
    if name in _WITHOUT_ARGUMENTS:
        return []
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    return [parameter for parameter in inspect.signature(function).parameters if parameter not in _OWN_ARGUMENTS]


def _allowed(name: str) -> str:
    names = _argument_names(name)
    return f"; --lr_scheduler_kwargs takes {', '.join(names) if names else 'nothing here'}"


def _cause(error: Exception) -> str:
    # Python starts the message with the name of a function of HF, which says nothing to the user.
    return first_line(error).rpartition("() ")[2]
