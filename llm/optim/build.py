"""The optimizer."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from llm.config.options import OptimizerOptions
from llm.optim.groups import parameter_groups

# Devices with one kernel for a whole update; the state is the same without it.
_FUSED = ("cuda", "cpu", "mps", "xpu")


def build_optimizer(model: nn.Module, options: OptimizerOptions) -> Optimizer:
    """AdamW, or SGD whose momentum is `adam_beta1`, over the model's parameters where they are now.

    Each group holds `initial_lr`, the peak that a schedule's factor multiplies, and `param_names`.

    Raises:
        ValueError: the model has no parameter to train.
    """
    groups = parameter_groups(model, options.weight_decay)
    if not groups:
        raise ValueError("the model has no parameter to train")
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    fused = all(p.device.type in _FUSED and p.is_floating_point() for p in parameters) or None
    optimizer: Optimizer
    if options.optim == "adamw":
        optimizer = AdamW(
            groups,
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            fused=fused,
        )
    else:
        optimizer = SGD(groups, lr=options.learning_rate, momentum=options.adam_beta1, fused=fused)
    for group in optimizer.param_groups:
        group["initial_lr"] = options.learning_rate
    return optimizer
