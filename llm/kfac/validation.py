"""What the arguments of a preconditioner may be, alone and together."""

from __future__ import annotations

from typing import Any

import torch

from llm.kfac.schedule import Number, dense_early

_CHOICES = {
    "rescale": ("norm", None),
    "method": ("eigen", "inverse"),
    "strategy": ("owner", "replicate"),
    "compat": (None, "kfac-pytorch"),
}
_AT_LEAST_ONE = (
    "factor_update_steps", "inv_update_steps", "accumulation_steps", "max_factor_dim", "factor_tokens",
)  # fmt: skip
_ABOVE_ZERO = ("damping", "kl_clip", "lr", "power")
# What may be a function of the update.
_SCHEDULED = ("factor_update_steps", "inv_update_steps", "damping", "factor_decay", "kl_clip", "lr")


FACTOR_UPDATE_STEPS = dense_early(10)
"""The default, which can be told from what the caller gives."""


class Default(float):
    """A default that can be told from the same number given by the caller."""


def as_anchor(
    factor_update_steps: Number, damping: Number, kl_clip: Number | None, lr: Number | None
) -> tuple[Number, Number, Number, Number]:
    """The same four, as kfac-pytorch has them where they were not given."""
    return (
        10 if factor_update_steps is FACTOR_UPDATE_STEPS else factor_update_steps,
        1e-3 if isinstance(damping, Default) else damping,
        1e-3 if kl_clip is None else kl_clip,
        0.1 if lr is None else lr,
    )


def check(given: dict[str, Any]) -> None:
    """Looks at the arguments by name; functions of the update are left alone.

    Raises:
        ValueError: one is out of its bounds, or does not go with another; the message names it.
    """
    for name, choices in _CHOICES.items():
        if given[name] not in choices:
            raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}, not {given[name]!r}")
    numbers = {name: given[name] for name in (*_AT_LEAST_ONE, *_ABOVE_ZERO, "factor_decay") if given[name] is not None}
    for name, number in numbers.items():
        if callable(number):
            if name not in _SCHEDULED:
                raise ValueError(f"{name} is a number, no function of the update")
        elif name in _AT_LEAST_ONE:
            _check_number(name, number, number >= 1, "at least 1")
        elif name in _ABOVE_ZERO:
            _check_number(name, number, number > 0, "above 0")
        else:
            _check_number(name, number, 0 < number <= 1, "above 0 and at most 1")
    if given["factor_dtype"] == torch.float16:
        raise ValueError(
            "factor_dtype is not torch.float16, for which squared gradients are too small; bfloat16 will do"
        )
    if given["kl_clip"] is not None and (given["rescale"] is not None or given["lr"] is None):
        raise ValueError('kl_clip needs rescale=None (rescale="norm" sets the lengths itself) and lr')
    if given["spread"] and given["compat"] is not None:
        raise ValueError("spread is not kfac-pytorch's way, which refreshes all layers at once")
    if given["method"] == "inverse" and given["power"] != 1:
        raise ValueError('power needs method="eigen"')


def _check_number(name: str, number: Number, is_good: bool, bound: str) -> None:
    if not is_good:
        raise ValueError(f"{name} is {bound}, not {number}")
