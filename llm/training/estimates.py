"""Estimates before the model is built: the lines of `--dry_run`, and the check that checkpoints fit on the disk."""

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

_BYTES_PER_VALUE = 4  # weights, gradients and optimizer state are fp32
# Activations that a block of GPT-2 keeps for the backward pass: about 17 values a token and unit of width. The logits
# are counted with their gradient: 3 values a logit. Source: Korthikanti et al., Reducing Activation Recomputation in
# Large Transformer Models, 2022, section 4.1 (there 34 bytes a token and unit of width, in 16 bits).
_VALUES_PER_UNIT = 17
_VALUES_PER_LOGIT = 3
# Checkpoints that must fit: the newest, the one before it, and one that is being written.
_NUM_CHECKPOINTS = 3


def dry_run_lines(
    config: PretrainedConfig,
    plan: Plan,
    optimizer: OptimizerOptions,
    schedule: Callable[[int], float],
    output: OutputOptions,
    kfac: KfacOptions,
) -> list[str]:
    """Return the lines that `--dry_run` adds to the first lines of a run; estimates are marked `about`.

    Args:
        config: of the model.
        plan: of the run.
        optimizer: options of the optimizer.
        schedule: the function from step k (0-based) to the factor of every learning rate.
        output: options of the run's folder, for the number of checkpoints.
        kfac: options of K-FAC.
    """
    num_parameters, num_states = count_values(config, optimizer.optim)
    kfac_memory, kfac_disk = kfac_bytes(config, kfac)
    weight_bytes = _BYTES_PER_VALUE * num_parameters
    state_bytes = _BYTES_PER_VALUE * num_states
    width = getattr(config, "hidden_size", 0) or 0
    num_layers = getattr(config, "num_hidden_layers", 0) or 0
    num_tokens = plan.micro_batch * plan.block_size
    values_per_token = _VALUES_PER_UNIT * width * num_layers + _VALUES_PER_LOGIT * int(config.vocab_size)
    activation_bytes = _BYTES_PER_VALUE * num_tokens * values_per_token
    at_most = "at most " if plan.document_mask else ""
    memory = (
        f"memory of one device: about {format_quantity(2 * weight_bytes + state_bytes)}B for weights, gradients "
        f"and {optimizer.optim}, about {format_quantity(activation_bytes)}B for activations in fp32"
    )
    if kfac.kfac:
        memory += f", about {format_quantity(kfac_memory)}B for K-FAC"
    return [
        f"tokens: {at_most}{plan.tokens_per_step:,} an update, {plan.num_steps * plan.tokens_per_step:,} in all",
        f"parameters: {num_parameters:,}",
        memory,
        f"disk: {format_quantity(weight_bytes)}B for the finished model, "
        f"about {format_quantity(weight_bytes + state_bytes + kfac_disk)}B for each checkpoint "
        f"({_num_checkpoints(plan, output)} kept)",
        f"learning rate: {_format_rates(optimizer.learning_rate, schedule, plan.num_steps)}",
        *[
            f"learning rate of {label}: {_format_rates(getattr(optimizer, option), schedule, plan.num_steps)}"
            for label, option in OPTIMIZERS[optimizer.optim].other_rates.items()
        ],
    ]


def count_values(config: PretrainedConfig, optim: str) -> tuple[int, int]:
    """Return the number of parameters of the model, and the number of values in the optimizer's state.

    The model is built on the meta device, which allocates no memory. A tied parameter counts once.

    Args:
        config: of the model.
        optim: `--optim`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()), OPTIMIZERS[optim].count_states(model)


def _format_rates(peak: float, schedule: Callable[[int], float], num_steps: int) -> str:
    highest = max(schedule(step) for step in _sampled_steps(num_steps))
    return (
        f"{peak * schedule(0):.3g} at the first update, {peak * highest:.3g} at its peak, "
        f"{peak * schedule(num_steps - 1):.3g} at the last, {peak * schedule(num_steps):.3g} beyond it"
    )


def _num_checkpoints(plan: Plan, output: OutputOptions) -> int:
    """Return the number of checkpoints that the folder holds at the end of the run."""
    if output.checkpointing_steps is None:
        return 0
    if output.checkpointing_steps == "epoch":
        num_saved = int(plan.num_epochs or 0)
    else:
        num_saved = plan.num_steps // output.checkpointing_steps
    return min(num_saved, output.save_total_limit or num_saved)


def _sampled_steps(num_steps: int) -> range:
    """Return at most about a thousand steps, spread evenly over the run."""
    return range(0, num_steps, max(1, num_steps // 1000))


def require_disk_space(
    checkpoints: Path, config: PretrainedConfig, optim: str, kfac: KfacOptions, *, is_fresh: bool
) -> None:
    """Refuse a run whose checkpoints do not fit on the disk.

    Checkpoints of an earlier start of this run are among the three that must fit, because they are removed in turn.
    Checkpoints of another run count as free space if this run starts from scratch, because it removes them.

    Args:
        checkpoints: the run's `checkpoints/`, whose parent folder exists.
        config: of the model.
        optim: `--optim`.
        kfac: options of K-FAC, whose state is larger than that of most optimizers.
        is_fresh: whether the run starts from scratch.

    Raises:
        UserError: three checkpoints need more bytes than are free, or K-FAC supports no layer of the model.
    """
    checkpoint_bytes = sum(count_values(config, optim)) * _BYTES_PER_VALUE + kfac_bytes(config, kfac)[1]
    existing = [path for _, path in saved_steps(checkpoints)]
    free_bytes = shutil.disk_usage(checkpoints.parent).free
    num_new = _NUM_CHECKPOINTS
    if is_fresh:
        free_bytes += sum(file.stat().st_size for path in existing for file in path.rglob("*") if file.is_file())
    else:
        num_new = max(1, num_new - len(existing))
    if free_bytes < num_new * checkpoint_bytes:
        raise UserError(
            f"--output_dir {checkpoints.parent}: {num_new} checkpoints of {format_quantity(checkpoint_bytes)}B need "
            f"{format_quantity(num_new * checkpoint_bytes)}B, and {format_quantity(free_bytes)}B are free; make room, "
            "or choose another folder"
        )
