"""Random numbers by arithmetic: what a micro-batch draws depends on where it stands, on nothing before it."""

from __future__ import annotations

import torch

from llm.system.hashing import GOLDEN_GAMMA, mix64


def derive_seed(*numbers: int) -> int:
    """Return a 63-bit seed that depends on all the numbers and on their order: `mix64` after each of them."""
    state = 0
    for number in numbers:
        state = mix64(state + number + GOLDEN_GAMMA)
    return state >> 1


def seed_weights(seed: int) -> None:
    """Seeds what draws a model's first weights: the same on every rank."""
    torch.manual_seed(derive_seed(seed, 0))


def seed_micro_batch(seed: int, step: int, micro_batch: int, rank: int, device: torch.device) -> None:
    """Seeds dropout for one forward and backward, so that a resumed run draws what the whole one drew.

    On the CPU and the device alone: `torch.manual_seed` also tells every kind of accelerator that is not there, and
    writes down the stack for each, 4 ms of an update of 90.
    """
    number = derive_seed(seed, 1, step, micro_batch, rank)
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)
