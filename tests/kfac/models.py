"""Small models, whose layers a dense oracle can compute, their data, and their loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH, CLASSES, POSITIONS = 8, 5, 6
Make = Callable[[int, int], nn.Module]


class Mlp(nn.Module):
    """Two layers and an output layer; a nonlinearity that works in place comes before the second."""

    def __init__(self, linear: Make) -> None:
        super().__init__()
        self.fc = linear(WIDTH, 7)
        self.proj = linear(7, 9)
        self.head = linear(9, CLASSES)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.proj(self.act(self.fc(x)))))


class Block(nn.Module):
    """A transformer block with one attention head, optionally under gradient checkpointing, and an output layer."""

    def __init__(self, linear: Make, reentrant: bool | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.reentrant = reentrant
        self.qkv = linear(WIDTH, 3 * WIDTH)
        self.out = linear(WIDTH, WIDTH)
        self.fc = linear(WIDTH, 12)
        self.proj = linear(12, WIDTH)
        self.head = linear(WIDTH, CLASSES)

    def block(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(((q @ k.mT) / WIDTH**0.5).softmax(-1) @ v)
        return x + self.proj(F.gelu(self.fc(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is not None and self.training:
            x = x.requires_grad_() if self.reentrant else x  # reentrant checkpoints need an input with a gradient
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        else:
            x = self.block(x)
        return self.head(x)


def linear(bias: bool) -> Make:
    """Return a function that makes nn.Linear layers."""
    return lambda num_in, num_out: nn.Linear(num_in, num_out, bias=bias)


def conv1d(num_in: int, num_out: int) -> nn.Module:
    """Return HuggingFace's Conv1D, with weights large enough to matter."""
    from transformers.pytorch_utils import (
        Conv1D,  # slow to import, and the subprocesses of test_assignment do not need it
    )

    layer = Conv1D(num_out, num_in)
    nn.init.normal_(layer.weight, std=num_in**-0.5)
    nn.init.normal_(layer.bias, std=0.1)
    return layer


def data(seed: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    """Return inputs, fp32 [rows, POSITIONS, WIDTH], and targets, int64 [rows, POSITIONS], some of them -100."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, POSITIONS, WIDTH, generator=draw)
    targets = torch.randint(CLASSES, (rows, POSITIONS), generator=draw)
    return x, targets.masked_fill(torch.rand(rows, POSITIONS, generator=draw) < 0.2, -100)


def loss_sum(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Return the loss summed over all targets except -100, in nats; scalar tensor of the model's dtype."""
    logits = model(x.to(next(model.parameters()).dtype))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
