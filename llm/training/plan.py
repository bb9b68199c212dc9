"""The numbers of a run that are known before the model is built: blocks, updates, accumulation, seed."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from llm.config.errors import UsageError, UserError
from llm.config.options import Options, TrainingOptions
from llm.data.batches.loader import BlockSource
from llm.optim.schedules import build_schedule

_DEFAULT_BLOCK_SIZE = 1024


@dataclass(frozen=True)
class Plan:
    """How the training blocks are divided among updates.

    Attributes:
        block_size: tokens a block.
        num_blocks: blocks of one epoch; None for a stream, whose length is unknown.
        micro_batch: blocks of one backward pass on one rank.
        accumulation: backward passes of one update on one rank.
        global_batch: blocks of one update over all ranks.
        num_steps: updates of the complete run.
        seed: seed of the data order and of all random numbers.
        document_mask: whether attention, positions and loss are limited to a document.
        num_unread: training blocks that the run never reads.
    """

    block_size: int
    num_blocks: int | None
    micro_batch: int
    accumulation: int
    global_batch: int
    num_steps: int
    seed: int
    document_mask: bool = False
    num_unread: int = 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in one update; an upper bound with a document mask, where first tokens are not predicted."""
        return self.global_batch * self.block_size

    @property
    def num_samples(self) -> int:
        """Blocks that the complete run reads, over all epochs."""
        return self.num_steps * self.global_batch

    @property
    def num_epochs(self) -> float | None:
        """Epochs that the updates read, as a fraction; None for a stream."""
        return None if self.num_blocks is None else self.num_steps * self.global_batch / self.num_blocks

    @property
    def num_unreached_tokens(self) -> int:
        """Tokens of the training blocks that the run never reads; 0 for a stream, where their number is unknown."""
        return self.num_unread * self.block_size

    def __str__(self) -> str:
        """Return one log line: number of updates, size of an update, epochs and seed."""
        epochs = "of a stream" if self.num_epochs is None else f"{self.num_epochs:.2f} epochs"
        unreached = f", {self.num_unreached_tokens:,} tokens never reached" if self.num_unreached_tokens else ""
        return (
            f"updates: {self.num_steps:,} of {self.global_batch} blocks of {self.block_size} tokens, "
            f"{epochs}{unreached}; seed {self.seed}"
        )


def choose_block_size(requested: int | None, model_limit: int, default_limit: int) -> int:
    """Return the block size of the run in tokens.

    Args:
        requested: `--block_size`; None takes the default, which is at most 1024.
        model_limit: the longest sequence that the model can read, in tokens.
        default_limit: the smaller of `model_limit` and the tokenizer's limit; it bounds only the default.

    Raises:
        UserError: the requested block is longer than `model_limit`.
    """
    if requested is None:
        return min(_DEFAULT_BLOCK_SIZE, default_limit)
    if requested > model_limit:
        raise UserError(
            f"--block_size {requested} is beyond the {model_limit} tokens that the model can read; use --block_size "
            f"{model_limit} or less (a model built from scratch takes more with --config_overrides, such as "
            f"n_positions={requested} for gpt2)"
        )
    return requested


def plan_run(
    options: TrainingOptions, blocks: BlockSource, *, num_ranks: int, seed: int, document_mask: bool = False
) -> Plan:
    """Divide the training blocks among updates.

    Args:
        options: batch sizes, and the length of the run.
        blocks: the training blocks.
        num_ranks: ranks that read different blocks.
        seed: of the run.
        document_mask: whether attention, positions and loss are limited to a document.

    Raises:
        UserError: the global batch is not divisible by the blocks of one backward pass on all ranks.
        UsageError: neither the number of blocks nor `--max_train_steps` is known.
    """
    per_backward, global_batch = _batch_sizes(options, num_ranks)
    num_steps = options.max_train_steps
    if num_steps is None:
        if blocks.num_blocks is None:
            raise UsageError("the length of a stream is unknown: give --max_train_steps")
        num_steps = math.ceil(options.num_train_epochs * blocks.num_blocks / global_batch)
    return Plan(
        block_size=blocks.block_size,
        num_blocks=blocks.num_blocks,
        micro_batch=options.per_device_train_batch_size,
        accumulation=global_batch // per_backward,
        global_batch=global_batch,
        num_steps=num_steps,
        seed=seed,
        document_mask=document_mask,
        num_unread=blocks.num_unread(num_steps * global_batch),
    )


def check_training(options: Options, *, num_ranks: int) -> None:
    """Refuse batch sizes and schedules that are known to be wrong before the text is read.

    Args:
        options: of the run.
        num_ranks: ranks that read different blocks.

    Raises:
        UserError: see `plan_run` and `plan_schedule`.
    """
    _batch_sizes(options.training, num_ranks)
    # A schedule that contradicts itself is wrong for any number of updates. The length of the warm-up is checked when
    # the number of updates is known.
    num_steps = options.training.max_train_steps or options.schedule.num_warmup_steps + 1000
    build_schedule(options.schedule, num_steps, learning_rate=options.optimizer.learning_rate)


def _batch_sizes(options: TrainingOptions, num_ranks: int) -> tuple[int, int]:
    """Return the blocks of one backward pass on all ranks together, and the blocks of one update."""
    per_backward = options.per_device_train_batch_size * num_ranks
    global_batch = options.global_batch_size or per_backward * options.gradient_accumulation_steps
    if global_batch % per_backward:
        raise UserError(
            f"--global_batch_size {global_batch} does not divide by {per_backward} "
            f"(--per_device_train_batch_size {options.per_device_train_batch_size} x {num_ranks} processes); "
            f"{_batch_size_hint(global_batch, num_ranks)}"
        )
    if options.torch_compile == "cudagraphs" and global_batch > per_backward:
        raise UserError(
            "--torch_compile cudagraphs: a graph overwrites the gradients of the pass before it, and this update has "
            f"{global_batch // per_backward} of them; use --torch_compile true, or a larger "
            "--per_device_train_batch_size without accumulation"
        )
    return per_backward, global_batch


def plan_schedule(options: Options, plan: Plan) -> Callable[[int], float]:
    """Return the function from step k (0-based) to the factor on every peak learning rate; it depends on k alone."""
    return build_schedule(options.schedule, plan.num_steps, learning_rate=options.optimizer.learning_rate)


def resolve_options(options: Options, plan: Plan, *, precision: str) -> Options:
    """Return the options with the values that the run chose itself: seed, block size and precision.

    A start from these options computes the same on any computer.

    Args:
        options: of the run.
        plan: of the run.
        precision: no, bf16 or fp16.
    """
    chosen = {"seed": plan.seed, "mixed_precision": precision}
    return options.model_copy(
        update={
            "training": options.training.model_copy(update=chosen),
            "data": options.data.model_copy(update={"block_size": plan.block_size}),
        }
    )


def choose_seed(requested: int | None) -> int:
    """Return the requested seed, or a random one below 2**31, which the run then records."""
    return secrets.randbelow(2**31) if requested is None else requested


def _batch_size_hint(global_batch: int, num_ranks: int) -> str:
    if global_batch % num_ranks:
        return f"choose a --global_batch_size that divides by {num_ranks}"
    per_rank = global_batch // num_ranks
    sizes = [str(size) for size in range(1, per_rank + 1) if per_rank % size == 0]
    return f"--per_device_train_batch_size may be {', '.join(sizes)}"
