"""Bounds of the preconditioner's arguments, and defaults that depend on other arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llm.kfac.schedule import ValueOrSchedule, dense_early

FACTOR_UPDATE_STEPS = dense_early(10)
"""Default of `factor_update_steps`; compared by identity, to know whether the caller gave a value."""


class Default(float):
    """A default number, which differs in type from the same number given by the caller."""


@dataclass(frozen=True)
class _Bound:
    """A condition on a number: its text for the error message, and the test."""

    text: str
    accepts: Callable[[float], bool]


_AT_LEAST_ONE = _Bound("at least 1", lambda number: number >= 1)
_ABOVE_ZERO = _Bound("above 0", lambda number: number > 0)
_SHARE = _Bound("above 0 and at most 1", lambda number: 0 < number <= 1)


def kfac_pytorch_defaults(
    factor_update_steps: ValueOrSchedule,
    damping: ValueOrSchedule,
    kl_clip: ValueOrSchedule | None,
    lr: ValueOrSchedule | None,
) -> tuple[ValueOrSchedule, ValueOrSchedule, ValueOrSchedule, ValueOrSchedule]:
    """Return the four arguments, with kfac-pytorch's default for each that the caller did not give.

    `factor_update_steps` keeps this package's default of 10 steps, without the early ones; kfac-pytorch's is 1.

    Source: https://github.com/gpauloski/kfac-pytorch, version 0.4, `kfac/preconditioner.py`.
    """
    return (
        10 if factor_update_steps is FACTOR_UPDATE_STEPS else factor_update_steps,
        1e-3 if isinstance(damping, Default) else damping,
        1e-3 if kl_clip is None else kl_clip,
        0.1 if lr is None else lr,
    )


def check_arguments(
    *,
    factor_update_steps: ValueOrSchedule,
    inv_update_steps: ValueOrSchedule,
    stagger: bool,
    damping: ValueOrSchedule,
    factor_decay: ValueOrSchedule,
    kl_clip: ValueOrSchedule | None,
    lr: ValueOrSchedule | None,
    accumulation_steps: int,
    rescale: str | None,
    power: float,
    method: str,
    max_factor_dim: int,
    factor_tokens: int | None,
    factor_dtype: torch.dtype,
    strategy: str,
    compat: str | None,
) -> None:
    """Check the arguments of `KFACPreconditioner`, alone and together. Functions of the step are not called.

    Raises:
        ValueError: an argument is out of its bounds, or cannot be combined with another; the message names it.
    """
    _check_choice("rescale", rescale, ("norm", None))
    _check_choice("method", method, ("eigen", "inverse"))
    _check_choice("strategy", strategy, ("owner", "replicate"))
    _check_choice("compat", compat, (None, "kfac-pytorch"))
    _check_value("factor_update_steps", factor_update_steps, _AT_LEAST_ONE)
    _check_value("inv_update_steps", inv_update_steps, _AT_LEAST_ONE)
    _check_number("accumulation_steps", accumulation_steps, _AT_LEAST_ONE)
    _check_number("max_factor_dim", max_factor_dim, _AT_LEAST_ONE)
    _check_number("factor_tokens", factor_tokens, _AT_LEAST_ONE)
    _check_value("damping", damping, _ABOVE_ZERO)
    _check_value("kl_clip", kl_clip, _ABOVE_ZERO)
    _check_value("lr", lr, _ABOVE_ZERO)
    _check_number("power", power, _ABOVE_ZERO)
    _check_value("factor_decay", factor_decay, _SHARE)
    if factor_dtype == torch.float16:
        raise ValueError("factor_dtype is torch.float16, in which squared gradients underflow; use torch.bfloat16")
    if kl_clip is not None and (rescale is not None or lr is None):
        raise ValueError('kl_clip needs rescale=None (rescale="norm" sets the lengths itself) and lr')
    if stagger and compat is not None:
        raise ValueError('stagger cannot be combined with compat="kfac-pytorch", which refreshes all layers at once')
    if method == "inverse" and power != 1:
        raise ValueError('power needs method="eigen"')


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}, not {value!r}")


def _check_value(name: str, value: ValueOrSchedule | None, bound: _Bound) -> None:
    """Check a value that may be a function of the step."""
    if not callable(value):
        _check_number(name, value, bound)


def _check_number(name: str, number: float | None, bound: _Bound) -> None:
    if callable(number):
        raise ValueError(f"{name} is a number, not a function of the step")
    if number is not None and not bound.accepts(number):
        raise ValueError(f"{name} is {bound.text}, not {number}")
