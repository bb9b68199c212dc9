"""`--dry_run`: what a run would be, from its options and its text alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from llm.config.options import OutputOptions
from llm.engine.lines import quantity
from llm.engine.plan import Plan

# fp32 weights, gradients and AdamW's two moments.
_BYTES_OF_WEIGHTS = 4
_BYTES_OF_TRAINING = 16
# Activations that GPT-2's block keeps for the backward pass: about 34 values a token and unit of width,
# and the logits with their gradient. Source: Korthikanti et al., Reducing Activation Recomputation in
# Large Transformer Models, 2022, section 4.1 (there in bytes at 16 bits).
_VALUES_PER_UNIT = 17
_VALUES_PER_LOGIT = 3


def dry_run_lines(
    config: PretrainedConfig, plan: Plan, learning_rate: Callable[[int], float], output: OutputOptions
) -> list[str]:
    """What `--dry_run` prints beyond a run's own first lines; all estimates are marked `about`."""
    num_parameters = count_parameters(config)
    width = getattr(config, "hidden_size", 0) or 0
    layers = getattr(config, "num_hidden_layers", 0) or 0
    tokens = plan.micro_batch * plan.block_size
    activations = 4 * tokens * (_VALUES_PER_UNIT * width * layers + _VALUES_PER_LOGIT * int(config.vocab_size))
    checkpoint = 12 * num_parameters
    last = plan.num_steps - 1
    return [
        f"tokens: {'at most ' if plan.document_mask else ''}{plan.tokens_per_step:,} an update, "
        f"{plan.num_steps * plan.tokens_per_step:,} in all",
        f"parameters: {num_parameters:,}",
        f"memory of one device: about {quantity(_BYTES_OF_TRAINING * num_parameters)}B for weights, gradients "
        f"and AdamW, about {quantity(activations)}B for activations in fp32",
        f"disk: {quantity(_BYTES_OF_WEIGHTS * num_parameters)}B for the finished model, "
        f"about {quantity(checkpoint)}B for each checkpoint ({_num_checkpoints(plan, output)} kept)",
        f"learning rate: {learning_rate(0):.3g} at the first update, "
        f"{max(learning_rate(step) for step in _some_steps(plan.num_steps)):.3g} at its peak, "
        f"{learning_rate(last):.3g} at the last, {learning_rate(plan.num_steps):.3g} beyond it",
    ]


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the model that the configuration describes, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


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
