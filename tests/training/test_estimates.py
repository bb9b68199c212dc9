"""Estimates of parameters and optimizer state, and the check that three checkpoints fit on the disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GPT2Config

from llm.config.errors import UserError
from llm.config.options import KfacOptions
from llm.optim.registry import OPTIMIZERS
from llm.training.estimates import count_values, require_disk_space

CONFIG = GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2)
ONE = 4 * count_values(CONFIG, "sgd")[0]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The bytes that the disk has."""
    disk = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    return disk


@pytest.mark.parametrize(("optim", "tensors"), [("adamw", 3), ("sgd", 2), ("three-states", 4)])
def test_room_when_three_checkpoints_do_not_fit_then_is_refused_with_both_numbers(
    tmp_path: Path, free: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, optim: str, tensors: int
) -> None:
    adamw = OPTIMIZERS["adamw"]
    three_states = replace(adamw, name="three-states", count_states=lambda model: 3 * model.num_parameters())
    monkeypatch.setitem(OPTIMIZERS, "three-states", three_states)
    free.free = 3 * tensors * ONE
    require_disk_space(tmp_path / "checkpoints", CONFIG, optim, KfacOptions(), is_fresh=True)
    free.free -= 1
    with pytest.raises(UserError, match=r"3 checkpoints of .*B need .*B, and .*B are free; make room") as refusal:
        require_disk_space(tmp_path / "checkpoints", CONFIG, optim, KfacOptions(), is_fresh=True)
    assert "\n" not in str(refusal.value)


def test_room_when_muon_then_its_matrices_keep_one_number_instead_of_two(tmp_path: Path, free: SimpleNamespace) -> None:
    in_blocks = 2 * 12 * 32 * 32  # a layer's matrices are 3 + 1 + 4 + 4 squares of the width
    assert count_values(CONFIG, "muon") == (ONE // 4, ONE // 4 * 2 - in_blocks)
    free.free = 3 * (3 * ONE - 4 * in_blocks)
    require_disk_space(tmp_path / "checkpoints", CONFIG, "muon", KfacOptions(), is_fresh=True)
    free.free -= 1
    with pytest.raises(UserError):
        require_disk_space(tmp_path / "checkpoints", CONFIG, "muon", KfacOptions(), is_fresh=True)


def test_room_when_the_run_has_checkpoints_then_fewer_need_room(tmp_path: Path, free: SimpleNamespace) -> None:
    for step, number in ((5, 2), (10, 1), (15, 1)):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
        free.free = number * 3 * ONE
        require_disk_space(tmp_path / "checkpoints", CONFIG, "adamw", KfacOptions(), is_fresh=False)
        free.free -= 1
        with pytest.raises(UserError):
            require_disk_space(tmp_path / "checkpoints", CONFIG, "adamw", KfacOptions(), is_fresh=False)


def test_room_when_an_earlier_run_is_replaced_then_its_checkpoints_count_as_free(
    tmp_path: Path, free: SimpleNamespace
) -> None:
    (tmp_path / "checkpoints" / "step_5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_5" / "model.safetensors").write_bytes(bytes(1000))
    free.free = 9 * ONE - 1000
    require_disk_space(tmp_path / "checkpoints", CONFIG, "adamw", KfacOptions(), is_fresh=True)
    free.free -= 1
    with pytest.raises(UserError):
        require_disk_space(tmp_path / "checkpoints", CONFIG, "adamw", KfacOptions(), is_fresh=True)
