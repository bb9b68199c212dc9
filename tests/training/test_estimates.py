"""Estimates of parameters and optimizer state, and the check that three checkpoints fit on the disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GPT2Config

from llm.config.errors import UserError
from llm.config.options import KfacOptions, OptimizerOptions, OutputOptions
from llm.optim.registry import OPTIMIZERS
from llm.system.units import format_quantity
from llm.training.estimates import count_values, dry_run_lines, require_disk_space
from llm.training.plan import Plan

CONFIG = GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2)
WEIGHT_BYTES = 4 * count_values(CONFIG, "sgd")[0]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk whose `free` bytes the test sets."""
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    return usage


@pytest.mark.parametrize(("optim", "tensors"), [("adamw", 3), ("sgd", 2), ("three-states", 4)])
def test_disk_space_when_three_checkpoints_do_not_fit_then_is_refused_with_both_numbers(
    tmp_path: Path, disk: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, optim: str, tensors: int
) -> None:
    adamw = OPTIMIZERS["adamw"]
    three_states = replace(adamw, name="three-states", count_states=lambda model: 3 * model.num_parameters())
    monkeypatch.setitem(OPTIMIZERS, "three-states", three_states)
    disk.free = 3 * tensors * WEIGHT_BYTES
    require_disk_space(tmp_path / "checkpoints", CONFIG, optim, KfacOptions(), is_fresh=True)
    disk.free -= 1
    with pytest.raises(UserError, match=r"3 checkpoints of .*B need .*B, and .*B are free; make room") as refusal:
        require_disk_space(tmp_path / "checkpoints", CONFIG, optim, KfacOptions(), is_fresh=True)
    assert "\n" not in str(refusal.value)


def test_disk_space_when_muon_then_its_matrices_have_one_state_instead_of_two(
    tmp_path: Path, disk: SimpleNamespace
) -> None:
    in_blocks = 2 * 12 * 32 * 32  # a layer's matrices are 3 + 1 + 4 + 4 squares of the width
    assert count_values(CONFIG, "muon") == (WEIGHT_BYTES // 4, WEIGHT_BYTES // 4 * 2 - in_blocks)
    disk.free = 3 * (3 * WEIGHT_BYTES - 4 * in_blocks)
    require_disk_space(tmp_path / "checkpoints", CONFIG, "muon", KfacOptions(), is_fresh=True)
    disk.free -= 1
    with pytest.raises(UserError):
        require_disk_space(tmp_path / "checkpoints", CONFIG, "muon", KfacOptions(), is_fresh=True)


def test_disk_space_when_the_run_has_checkpoints_then_fewer_need_room(tmp_path: Path, disk: SimpleNamespace) -> None:
    for step, number in ((5, 2), (10, 1), (15, 1)):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
        disk.free = number * 3 * WEIGHT_BYTES
        require_disk_space(tmp_path / "checkpoints", CONFIG, "adamw", KfacOptions(), is_fresh=False)
        disk.free -= 1
        with pytest.raises(UserError):
            require_disk_space(tmp_path / "checkpoints", CONFIG, "adamw", KfacOptions(), is_fresh=False)


def test_disk_space_when_an_earlier_run_is_replaced_then_its_checkpoints_count_as_free(
    tmp_path: Path, disk: SimpleNamespace
) -> None:
    (tmp_path / "checkpoints" / "step_5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_5" / "model.safetensors").write_bytes(bytes(1000))
    disk.free = 9 * WEIGHT_BYTES - 1000
    require_disk_space(tmp_path / "checkpoints", CONFIG, "adamw", KfacOptions(), is_fresh=True)
    disk.free -= 1
    with pytest.raises(UserError):
        require_disk_space(tmp_path / "checkpoints", CONFIG, "adamw", KfacOptions(), is_fresh=True)


def test_dry_run_lines_when_kfac_is_on_then_its_memory_is_added() -> None:
    plan = Plan(block_size=16, num_blocks=100, micro_batch=4, accumulation=2, global_batch=8, num_steps=10, seed=1)
    optimizer = OptimizerOptions(learning_rate=1e-3)
    output = OutputOptions(checkpointing_steps=3)

    def schedule(step: int) -> float:
        return 1 - step / 10

    def lines(kfac: KfacOptions) -> list[str]:
        return dry_run_lines(CONFIG, plan, optimizer, schedule, output, kfac)

    num_parameters = (257 + 64) * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    tokens, parameters, memory, disk, rate = lines(KfacOptions())
    assert tokens == "tokens: 128 an update, 1,280 in all"
    assert parameters == f"parameters: {num_parameters:,}"
    # 4 bytes, 64 tokens, 17 values of 2 blocks of width 32, 3 of 257 logits.
    assert f"about {format_quantity(4 * 64 * (17 * 2 * 32 + 3 * 257))}B for activations" in memory
    assert "K-FAC" not in memory
    assert "(3 kept)" in disk
    assert rate == "learning rate: 0.001 at the first update, 0.001 at its peak, 0.0001 at the last, 0 beyond it"
    with_kfac = lines(KfacOptions(kfac=True))[2]
    assert with_kfac.startswith(memory + ", about ")
    assert with_kfac.endswith("B for K-FAC")
