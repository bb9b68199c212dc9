"""Measurements of an update: shares, the sizes of a sweep, and updates that overflow."""

from __future__ import annotations

import gc
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import llm.training.profiling.measure as measure
from llm.bench import main
from llm.config.errors import UserError
from llm.system.garbage_collection import freeze_heap
from llm.training.profiling.measure import Measurement, StepBenchmark, SyntheticBlocks, measured_flops

TINY = [
    *("--config_overrides", "n_layer=2,n_head=2,n_embd=32,vocab_size=97,n_positions=64", "--block_size", "32"),
    *("--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--seed", "1", "--use_cpu"),
    *("--mixed_precision", "no", "--num_updates", "5", "--torch_compile", "false"),
]


def measurement(**values: Any) -> Measurement:
    defaults: dict[str, Any] = {
        "micro_batch": 4,
        "tokens": 1000,
        "seconds": (3.0, 2.0, 10.0),
        "cpu_seconds": 4.0,
        "data_seconds": 0.3,
        "phase_seconds": {"forward": 0.6, "backward": 1.2, "optimizer": 0.3},
        "communication_seconds": None,
        "peak_bytes": 100,
        "period": 1,
    }
    return Measurement(**(defaults | values))


def test_measurement_when_one_update_was_slow_then_the_median_counts() -> None:
    assert measurement().median_seconds == 3.0
    assert measurement().tokens_per_second == pytest.approx(1000 / 3)


def test_shares_when_the_phases_are_shorter_than_an_update_then_the_rest_is_the_difference() -> None:
    assert measurement().shares() == pytest.approx(
        {"forward": 0.2, "backward": 0.4, "optimizer": 0.1, "data wait": 0.1, "rest": 0.2}
    )


def test_shares_when_the_phases_are_longer_than_an_update_then_their_sum_is_one() -> None:
    shares = measurement(seconds=(2.0,)).shares()
    assert shares == pytest.approx(
        {"forward": 0.25, "backward": 0.5, "optimizer": 0.125, "data wait": 0.125, "rest": 0.0}
    )


def test_synthetic_blocks_when_read_again_then_the_ids_are_the_same_and_below_the_vocabulary_size() -> None:
    blocks = SyntheticBlocks(block_size=16, vocabulary_size=10)
    row = blocks.block(3, seed=1)
    assert row.ids.shape == (17,)
    assert row.ids.dtype == np.int64
    assert row.ids.min() >= 0 and row.ids.max() < 10
    assert np.array_equal(row.ids, blocks.block(3, seed=1).ids)
    assert not np.array_equal(row.ids, blocks.block(4, seed=1).ids)
    assert not np.array_equal(row.ids, blocks.block(3, seed=2).ids)
    assert (blocks.num_blocks, blocks.num_unread(5)) == (None, 0)


def test_sizes_when_there_is_a_global_batch_then_are_its_divisors_and_otherwise_powers_of_two() -> None:
    assert list(measure._sizes(12)) == [1, 2, 3, 4, 6, 12]
    assert list(islice(measure._sizes(None), 5)) == [1, 2, 4, 8, 16]


def test_round_up_when_the_period_does_not_divide_then_is_the_next_multiple() -> None:
    assert [measure._round_up(number, 4) for number in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_fits_when_memory_grows_in_proportion_then_the_available_bytes_bound_the_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "available_bytes", lambda: 151)
    monkeypatch.setattr(measure, "resident_bytes", lambda: 50)
    previous = measurement(micro_batch=4, peak_bytes=100)
    assert benchmark_of(None)._fits(8, previous)  # 200 - 50 < 151
    monkeypatch.setattr(measure, "available_bytes", lambda: 150)
    assert not benchmark_of(None)._fits(8, previous)
    monkeypatch.setattr(measure, "available_bytes", lambda: None)
    assert benchmark_of(None)._fits(8, previous)


def test_measured_flops_when_measured_then_are_those_of_a_processor() -> None:
    assert 1e8 < measured_flops(torch.device("cpu"), torch.float32) < 1e14


def test_sweep_when_memory_runs_out_then_the_sizes_that_fit_count_and_none_is_an_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StepBenchmark.measure
    largest = 2

    def measured(self: StepBenchmark, num_updates: int, micro_batch: int, accumulation: int | None) -> Measurement:
        if micro_batch > largest:
            freeze_heap()  # as after the updates that fit
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, num_updates, micro_batch, accumulation)

    monkeypatch.setattr(StepBenchmark, "measure", measured)
    assert main([*TINY, "--sweep", "micro_batch", "--num_updates", "2"]) == 0
    assert "fastest: --per_device_train_batch_size" in capfd.readouterr().out
    largest = 0
    assert main([*TINY, "--sweep", "micro_batch", "--num_updates", "2"]) == 1
    assert "error: a micro-batch of one block does not fit: CUDA out of memory." in capfd.readouterr().err
    assert gc.get_freeze_count() == 0


class OverflowingUpdater:
    """An updater whose first three updates are skipped because of an overflow."""

    def __init__(self, *, loss_scale_is_falling: bool) -> None:
        self.loss_scale_is_falling = loss_scale_is_falling
        self.num_calls = 0

    def profiling_targets(self) -> None:
        return None

    def update(self, *_: object, **__: object) -> Any:
        self.num_calls += 1
        return SimpleNamespace(skipped=self.num_calls < 4, loss_scale_is_falling=self.loss_scale_is_falling)


def benchmark_of(updater: Any) -> StepBenchmark:
    compute: Any = SimpleNamespace(world=SimpleNamespace(device=torch.device("cpu")))
    unused: Any = None
    return StepBenchmark(compute, updater or OverflowingUpdater(loss_scale_is_falling=True), unused, unused, 0)


def test_update_when_fp16_overflows_at_first_then_is_repeated_until_the_loss_scale_is_right() -> None:
    updater = OverflowingUpdater(loss_scale_is_falling=True)
    benchmark = benchmark_of(updater)
    benchmark._update([])
    assert updater.num_calls == 4
    with pytest.raises(UserError, match="not finite"):
        benchmark_of(OverflowingUpdater(loss_scale_is_falling=False))._update([])
