"""Estimates before the model is built: what `--dry_run` prints, and whether the disk has room for checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from llm.config.errors import UserError
from llm.config.options import KfacOptions, OptimizerOptions, OutputOptions
from llm.optim.registry import OPTIMIZERS
from llm.system.units import format_quantity
from llm.training.checkpoints.layout import saved_steps
from llm.training.plan import Plan
from llm.training.updaters.preconditioning import kfac_bytes

_BYTES_PER_VALUE = 4  # weights, gradients and what the optimizer keeps are fp32
# Activations that GPT-2's block keeps for the backward pass: about 34 values a token and unit of width,
# and the logits with their gradient. Source: Korthikanti et al., Reducing Activation Recomputation in
# Large Transformer Models, 2022, section 4.1 (there in bytes at 16 bits).
_VALUES_PER_UNIT = 17
_VALUES_PER_LOGIT = 3
# Checkpoints that need room: the newest, the one before it, and one that is being written.
_NUM_CHECKPOINTS = 3


def dry_run_lines(
    config: PretrainedConfig,
    plan: Plan,
    optimizer: OptimizerOptions,
    schedule: Callable[[int], float],
    output: OutputOptions,
    kfac: KfacOptions,
) -> list[str]:
    """What `--dry_run` prints beyond a run's own first lines; all estimates are marked `about`."""
    num_parameters, num_kept = count_values(config, optimizer.optim)
    kfac_memory, kfac_disk = kfac_bytes(config, kfac)
    weights, kept = _BYTES_PER_VALUE * num_parameters, _BYTES_PER_VALUE * num_kept
    width = getattr(config, "hidden_size", 0) or 0
    layers = getattr(config, "num_hidden_layers", 0) or 0
    tokens = plan.micro_batch * plan.block_size
    activations = 4 * tokens * (_VALUES_PER_UNIT * width * layers + _VALUES_PER_LOGIT * int(config.vocab_size))
    return [
        f"tokens: {'at most ' if plan.document_mask else ''}{plan.tokens_per_step:,} an update, "
        f"{plan.num_steps * plan.tokens_per_step:,} in all",
        f"parameters: {num_parameters:,}",
        f"memory of one device: about {format_quantity(2 * weights + kept)}B for weights, gradients "
        f"and {optimizer.optim}, about {format_quantity(activations)}B for activations in fp32"
        + f", about {format_quantity(kfac_memory)}B for K-FAC"
        * kfac.kfac,
        f"disk: {format_quantity(weights)}B for the finished model, "
        f"about {format_quantity(weights + kept + kfac_disk)}B for each checkpoint "
        f"({_num_checkpoints(plan, output)} kept)",
        f"learning rate: {_rates(optimizer.learning_rate, schedule, plan.num_steps)}",
        *[
            f"learning rate of {label}: {_rates(getattr(optimizer, option), schedule, plan.num_steps)}"
            for label, option in OPTIMIZERS[optimizer.optim].other_rates.items()
        ],
    ]


def count_values(config: PretrainedConfig, optim: str) -> tuple[int, int]:
    """Count the parameters of the model that the configuration describes, and the values that the optimizer keeps.

    Nothing is allocated. A tied parameter counts once.

    Args:
        config: of the model.
        optim: `--optim`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()), OPTIMIZERS[optim].count_states(model)


def _rates(peak: float, schedule: Callable[[int], float], num_steps: int) -> str:
    highest = max(schedule(step) for step in _some_steps(num_steps))
    return (
        f"{peak * schedule(0):.3g} at the first update, {peak * highest:.3g} at its peak, "
        f"{peak * schedule(num_steps - 1):.3g} at the last, {peak * schedule(num_steps):.3g} beyond it"
    )


def _num_checkpoints(plan: Plan, output: OutputOptions) -> int:
    """Checkpoints that lie on the disk at the end."""
    if output.checkpointing_steps is None:
        return 0
    if output.checkpointing_steps == "epoch":
        num_saved = int(plan.num_epochs or 0)
    else:
        num_saved = plan.num_steps // output.checkpointing_steps
    return min(num_saved, output.save_total_limit or num_saved)


def _some_steps(num_steps: int) -> range:
    """At most about a thousand updates, spread over the run."""
    return range(0, num_steps, max(1, num_steps // 1000))


def require_disk_space(
    checkpoints: Path, config: PretrainedConfig, optim: str, kfac: KfacOptions, *, is_fresh: bool
) -> None:
    """Refuses a run whose checkpoints will not fit on the disk.

    What an earlier start of the run saved counts: it is rotated away. What an earlier run left is removed when a
    fresh one begins.

    Args:
        checkpoints: the run's `checkpoints/`, whose parent is there.
        config: of the model.
        optim: `--optim`.
        kfac: of K-FAC, which keeps more than most optimizers.
        is_fresh: whether nothing is continued.

    Raises:
        UserError: three checkpoints need more than is free, or K-FAC has nothing to take in the model.
    """
    one = sum(count_values(config, optim)) * _BYTES_PER_VALUE + kfac_bytes(config, kfac)[1]
    present = [path for _, path in saved_steps(checkpoints)]
    free = shutil.disk_usage(checkpoints.parent).free
    number = _NUM_CHECKPOINTS
    if is_fresh:
        free += sum(file.stat().st_size for path in present for file in path.rglob("*") if file.is_file())
    else:
        number = max(1, number - len(present))
    if free < number * one:
        raise UserError(
            f"--output_dir {checkpoints.parent}: {number} checkpoints of {format_quantity(one)}B need "
            f"{format_quantity(number * one)}B, and {format_quantity(free)}B are free; make room, or choose another "
            "folder"
        )
