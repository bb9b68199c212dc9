"""The numbers of a run, known before the model is built: blocks, updates, accumulation, seed."""

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
    """How the training text is cut into updates.

    Attributes:
        block_size: tokens a block.
        num_blocks: blocks of one epoch; None of a stream, whose length nobody knows.
        micro_batch: blocks of one backward on one rank.
        accumulation: backwards of one update on one rank.
        global_batch: blocks of one update over all ranks.
        num_steps: updates of the whole run.
        seed: the seed of the order and of everything random.
        document_mask: whether attention, positions and loss stay inside a document.
        num_unread: blocks that the run never reads.
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
        """Tokens predicted in one update, with a document mask less those that begin a document."""
        return self.global_batch * self.block_size

    @property
    def num_samples(self) -> int:
        """Blocks that the whole run reads, over all epochs."""
        return self.num_steps * self.global_batch

    @property
    def num_epochs(self) -> float | None:
        """Epochs that the updates read, as a fraction; None of a stream."""
        return None if self.num_blocks is None else self.num_steps * self.global_batch / self.num_blocks

    @property
    def num_unreached_tokens(self) -> int:
        """Tokens of the training blocks that the run never reads; 0 of a stream, where nobody knows yet."""
        return self.num_unread * self.block_size

    def __str__(self) -> str:
        """One line: updates, what one is, epochs."""
        epochs = "of a stream" if self.num_epochs is None else f"{self.num_epochs:.2f} epochs"
        unreached = f", {self.num_unreached_tokens:,} tokens never reached" if self.num_unreached_tokens else ""
        return (
            f"updates: {self.num_steps:,} of {self.global_batch} blocks of {self.block_size} tokens, "
            f"{epochs}{unreached}; seed {self.seed}"
        )


def choose_block_size(asked: int | None, model_limit: int, default_limit: int) -> int:
    """The block size of the run.

    Args:
        asked: what the option says.
        model_limit: tokens that the model can read at once.
        default_limit: the smaller of that and the tokenizer's limit, which binds only the default.

    Raises:
        UserError: the model cannot read blocks that long.
    """
    if asked is None:
        return min(_DEFAULT_BLOCK_SIZE, default_limit)
    if asked > model_limit:
        raise UserError(
            f"--block_size {asked} is beyond the {model_limit} tokens that the model can read; use --block_size "
            f"{model_limit} or less (a model built from scratch takes more with --config_overrides, such as "
            f"n_positions={asked} for gpt2)"
        )
    return asked


def plan_run(
    options: TrainingOptions, blocks: BlockSource, *, num_ranks: int, seed: int, document_mask: bool = False
) -> Plan:
    """Cuts the training blocks into updates.

    Raises:
        UserError: the global batch does not divide among the ranks.
        UsageError: neither the length of the text is known nor that of the run.
    """
    per_backward, global_batch = _batches(options, num_ranks)
    num_steps = options.max_train_steps
    if num_steps is None:
        if blocks.num_blocks is None:
            raise UsageError("the length of a stream is not known: give --max_train_steps")
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
    """Refuses what can be known wrong about batches and schedule before the text is read.

    Raises:
        UserError: as `plan_run` and `plan_schedule`.
    """
    _batches(options.training, num_ranks)
    # A schedule wrong in itself is so for any number of updates; the warm-up is judged when that is known.
    any_number = options.training.max_train_steps or options.schedule.num_warmup_steps + 1000
    build_schedule(options.schedule, any_number, learning_rate=options.optimizer.learning_rate)


def _batches(options: TrainingOptions, num_ranks: int) -> tuple[int, int]:
    """Blocks of one backward on all ranks together, and of one update."""
    per_backward = options.per_device_train_batch_size * num_ranks
    global_batch = options.global_batch_size or per_backward * options.gradient_accumulation_steps
    if global_batch % per_backward:
        raise UserError(
            f"--global_batch_size {global_batch} does not divide by {per_backward} "
            f"(--per_device_train_batch_size {options.per_device_train_batch_size} x {num_ranks} processes); "
            f"{_sizes_that_work(global_batch, num_ranks)}"
        )
    if options.torch_compile == "cudagraphs" and global_batch > per_backward:
        raise UserError(
            "--torch_compile cudagraphs: a graph overwrites the gradients of the pass before it, and this update has "
            f"{global_batch // per_backward} of them; use --torch_compile true, or a larger "
            "--per_device_train_batch_size without accumulation"
        )
    return per_backward, global_batch


def plan_schedule(options: Options, plan: Plan) -> Callable[[int], float]:
    """The share of its peak that every learning rate has in update k (0-based), a function of k alone."""
    return build_schedule(options.schedule, plan.num_steps, learning_rate=options.optimizer.learning_rate)


def resolve_options(options: Options, plan: Plan, *, precision: str) -> Options:
    """The options with what the run chose itself: the seed, the block size, and the arithmetic.

    A start from these, on whatever machine, computes as this one did.
    """
    chosen = {"seed": plan.seed, "mixed_precision": precision}
    return options.model_copy(
        update={
            "training": options.training.model_copy(update=chosen),
            "data": options.data.model_copy(update={"block_size": plan.block_size}),
        }
    )


def choose_seed(asked: int | None) -> int:
    """The seed of the run: the asked one, or one drawn from the system, which the run then records."""
    return secrets.randbelow(2**31) if asked is None else asked


def _sizes_that_work(global_batch: int, num_ranks: int) -> str:
    if global_batch % num_ranks:
        return f"choose a --global_batch_size that divides by {num_ranks}"
    per_rank = global_batch // num_ranks
    sizes = [str(size) for size in range(1, per_rank + 1) if per_rank % size == 0]
    return f"--per_device_train_batch_size may be {', '.join(sizes)}"
