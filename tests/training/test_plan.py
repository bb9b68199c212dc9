"""The numbers of a run, from its options and the length of its text."""

from __future__ import annotations

import numpy as np
import pytest

from llm.config.errors import UserError
from llm.config.options import OptimizerOptions, Options, ScheduleOptions, TrainingOptions
from llm.data.batches.blocks import Blocks
from llm.training.plan import Plan, choose_block_size, choose_seed, plan_run, plan_schedule, resolve_options


def blocks(number: int, block_size: int = 16) -> Blocks:
    return Blocks(np.zeros(number * block_size + 1, np.uint16), block_size)


def planned(num_blocks: int = 100, num_ranks: int = 1, **options: object) -> Plan:
    training = TrainingOptions.model_validate(options)
    return plan_run(training, blocks(num_blocks), num_ranks=num_ranks, seed=5)


def test_plan_when_no_option_is_given_then_has_huggingfaces_defaults() -> None:
    plan = planned()
    assert (plan.micro_batch, plan.accumulation, plan.global_batch) == (8, 1, 8)
    assert plan.num_steps == 38  # 3 epochs of 100 blocks are 37.5 updates of 8
    assert (plan.block_size, plan.num_blocks, plan.seed) == (16, 100, 5)


@pytest.mark.parametrize(
    ("per_device", "num_ranks", "accumulation"), [(48, 1, 1), (12, 2, 2), (3, 4, 4), (1, 1, 48), (1, 48, 1)]
)
def test_accumulation_when_the_global_batch_is_given_then_follows_from_it(
    per_device: int, num_ranks: int, accumulation: int
) -> None:
    plan = planned(num_ranks=num_ranks, per_device_train_batch_size=per_device, global_batch_size=48)
    assert (plan.micro_batch, plan.accumulation, plan.global_batch) == (per_device, accumulation, 48)


def test_global_batch_when_not_given_then_is_the_product() -> None:
    plan = planned(num_ranks=3, per_device_train_batch_size=2, gradient_accumulation_steps=5)
    assert (plan.global_batch, plan.tokens_per_step) == (30, 480)


def test_global_batch_when_it_does_not_divide_then_every_size_that_works_is_named() -> None:
    with pytest.raises(UserError, match=r"may be (.*)$") as refusal:
        planned(num_ranks=2, global_batch_size=24)  # 8 blocks on each of 2 ranks: 16
    sizes = str(refusal.value).rpartition("may be ")[2].split(", ")
    assert sizes == ["1", "2", "3", "4", "6", "12"]
    for size in sizes:
        plan = planned(num_ranks=2, global_batch_size=24, per_device_train_batch_size=int(size))
        assert plan.accumulation * int(size) * 2 == 24


def test_global_batch_when_no_size_works_then_the_divisor_is_named() -> None:
    with pytest.raises(UserError, match="--global_batch_size that divides by 4"):
        planned(num_ranks=4, global_batch_size=30)


@pytest.mark.parametrize(
    ("num_blocks", "epochs", "num_steps"), [(16, 1, 2), (17, 1, 3), (17, 2, 5), (1, 1, 1), (1, 16, 2)]
)
def test_epochs_when_not_whole_updates_then_are_rounded_up(num_blocks: int, epochs: int, num_steps: int) -> None:
    plan = planned(num_blocks, num_train_epochs=epochs)
    assert plan.num_steps == num_steps
    assert plan.num_epochs == pytest.approx(num_steps * 8 / num_blocks)
    assert plan.num_unreached_tokens == 0


def test_steps_when_given_then_replace_epochs_and_unread_tokens_are_counted() -> None:
    plan = planned(max_train_steps=4)
    assert plan.num_steps == 4
    assert plan.num_unreached_tokens == (100 - 4 * 8) * 16
    assert "4 of 8 blocks of 16 tokens, 0.32 epochs, 1,088 tokens never reached; seed 5" in str(plan)
    assert "never reached" not in str(planned(max_train_steps=13))


def test_block_size_when_not_given_then_is_the_smallest_limit() -> None:
    assert choose_block_size(None, 4096, 4096) == 1024
    assert choose_block_size(None, 64, 64) == 64
    assert choose_block_size(None, 2048, 512) == 512


def test_block_size_when_given_then_only_the_model_bounds_it() -> None:
    assert choose_block_size(2048, 2048, 512) == 2048
    with pytest.raises(UserError, match=r"--block_size 65 .* 64 tokens .*--block_size 64 or less"):
        choose_block_size(65, 64, 64)


def test_schedule_when_called_in_any_order_then_is_the_same_function_of_the_step() -> None:
    options = Options(optimizer=OptimizerOptions(learning_rate=0.5), schedule=ScheduleOptions(num_warmup_steps=2))
    factor = plan_schedule(options, planned(max_train_steps=10))
    backwards = [factor(step) for step in range(10, -1, -1)]
    assert backwards[::-1] == pytest.approx([0, 0.5, *(left / 8 for left in range(8, -1, -1))])


def test_seed_when_given_then_is_kept_and_otherwise_random() -> None:
    assert choose_seed(0) == 0
    seeds = {choose_seed(None) for _ in range(20)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**31 for seed in seeds)


class EndlessBlocks(Blocks):
    """Blocks whose number is unknown."""

    num_blocks = None  # type: ignore[assignment]


def test_plan_when_the_length_of_the_text_is_unknown_then_has_updates_only() -> None:
    endless = EndlessBlocks(np.zeros(17, np.uint16), 16)
    plan = plan_run(TrainingOptions(max_train_steps=9), endless, num_ranks=1, seed=5)
    assert (plan.num_blocks, plan.num_epochs, plan.num_unreached_tokens) == (None, None, 0)
    assert str(plan) == "updates: 9 of 8 blocks of 16 tokens, of a stream; seed 5"
    with pytest.raises(UserError, match="give --max_train_steps"):
        plan_run(TrainingOptions(), endless, num_ranks=1, seed=5)


def test_plan_when_cuda_graphs_would_accumulate_then_is_refused_with_the_alternative() -> None:
    assert planned(torch_compile="cudagraphs").accumulation == 1
    for batch in ({"gradient_accumulation_steps": 2}, {"global_batch_size": 24}):
        with pytest.raises(UserError, match=r"overwrites the gradients.*use --torch_compile true"):
            planned(torch_compile="cudagraphs", **batch)
    assert planned(torch_compile="max-autotune", gradient_accumulation_steps=2).accumulation == 2


def test_resolve_options_when_the_run_chose_values_then_they_are_recorded_and_the_rest_is_kept() -> None:
    options = Options(training=TrainingOptions(max_train_steps=7))
    plan = planned(max_train_steps=7)
    resolved = resolve_options(options, plan, precision="bf16")
    assert (resolved.training.seed, resolved.training.mixed_precision, resolved.data.block_size) == (5, "bf16", 16)
    assert resolved.training.max_train_steps == 7
    assert resolved.optimizer == options.optimizer
    assert options.training.seed is None
