"""Bounds of the preconditioner's arguments, and the defaults of kfac-pytorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llm.kfac import KFACPreconditioner, dense_early
from llm.kfac.validation import FACTOR_UPDATE_STEPS, Default, kfac_pytorch_defaults


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"factor_update_steps": 0}, "factor_update_steps is at least 1, not 0"),
        ({"damping": 0.0}, "damping is above 0"),
        ({"factor_decay": 1.5}, "factor_decay is above 0 and at most 1"),
        ({"method": "svd"}, "method is one of 'eigen', 'inverse', not 'svd'"),
        ({"compat": "kfac"}, "compat is one of None, 'kfac-pytorch'"),
        ({"kl_clip": 1e-3, "lr": 0.1}, "kl_clip needs rescale=None"),
        ({"kl_clip": 1e-3, "rescale": None}, "and lr"),
        ({"compat": "kfac-pytorch", "stagger": True}, "stagger cannot be combined"),
        ({"method": "inverse", "power": 0.5}, 'power needs method="eigen"'),
        ({"power": lambda _: 1.0}, "power is a number, not a function of the step"),
        ({"factor_dtype": torch.float16}, "factor_dtype is torch.float16"),
    ],
)
def test_arguments_when_out_of_bounds_then_the_error_names_them(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KFACPreconditioner(nn.Linear(2, 2), **arguments)


def test_arguments_when_a_function_of_the_step_then_are_not_called() -> None:
    def fails(step: int) -> float:
        raise AssertionError(step)

    KFACPreconditioner(nn.Linear(2, 2), inv_update_steps=fails, damping=fails, factor_decay=fails)


def test_defaults_when_compatible_then_are_those_of_kfac_pytorch_unless_given() -> None:
    assert kfac_pytorch_defaults(FACTOR_UPDATE_STEPS, Default(0.1), None, None) == (10, 1e-3, 1e-3, 0.1)
    interval = dense_early(10)  # equal to the default, but given
    assert kfac_pytorch_defaults(interval, 0.1, 2e-3, 0.5) == (interval, 0.1, 2e-3, 0.5)
