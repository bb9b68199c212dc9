"""The optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from llm.config.errors import UserError
from llm.config.options import OptimizerOptions
from llm.optim.groups import muon_groups, parameter_groups
from llm.optim.muon import Muon, MuonWithAdamW

# Devices with one kernel for a whole update; the state is the same without it.
_FUSED = ("cuda", "cpu", "mps", "xpu")


def build_optimizer(model: nn.Module, options: OptimizerOptions) -> Optimizer:
    """The optimizer over the model's parameters where they are now.

    AdamW; SGD, whose momentum is `adam_beta1`; or Muon for the matrices inside the blocks with AdamW for the rest.
    Each group holds `initial_lr`, the peak that a schedule's factor multiplies, and `param_names`; the main peak is
    `optimizer.defaults["lr"]`.

    Raises:
        ValueError: the model has no parameter to train.
        UserError: it has none for the optimizer that was asked for.
    """
    groups = parameter_groups(model, options.weight_decay)
    if not groups:
        raise ValueError("the model has no parameter to train")
    optimizer: Optimizer
    if options.optim == "adamw":
        optimizer = _adamw(groups, options)
    elif options.optim == "sgd":
        optimizer = SGD(groups, lr=options.learning_rate, momentum=options.adam_beta1, fused=_fused(groups))
    else:
        optimizer = _muon(model, options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _adamw(groups: list[dict[str, Any]], options: OptimizerOptions) -> AdamW:
    return AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=_fused(groups),
    )


def _muon(model: nn.Module, options: OptimizerOptions) -> MuonWithAdamW:
    matrices, others = muon_groups(model, options.weight_decay)
    if not matrices:
        raise UserError(
            "--optim muon is for the weights of Linear and Conv1D inside a model's blocks, and this model trains none; "
            "use --optim adamw"
        )
    muon = Muon(matrices, lr=options.muon_learning_rate, momentum=options.muon_momentum)
    return MuonWithAdamW(muon, _adamw(others, options) if others else None)


def _fused(groups: list[dict[str, Any]]) -> bool | None:
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    return all(p.device.type in _FUSED and p.is_floating_point() for p in parameters) or None
