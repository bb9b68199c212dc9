"""One, two and four ranks on one global batch, as real processes with gloo.

This file is also the program that each process runs; see `train`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm.kfac import KFACPreconditioner
from llm.kfac.assignment import assign, refresh_offsets
from llm.kfac.layers import Layer
from tests.kfac.models import Mlp, data, linear, loss_sum

SIZES = (1, 2, 4)
NUM_STEPS = 6
SAVED_AT = 3
ROWS = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "owner": {},
    "replicate": {"strategy": "replicate"},
    "inverse": {"method": "inverse"},
    "stagger": {"stagger": True},
    "clipped": {"rescale": None, "kl_clip": 1e-3, "lr": 0.1},
    "compat": {"compat": "kfac-pytorch", "lr": 1.0},
}
# DDP changes the order of its sums after the first backward pass, so that a resume is not exact.
IN_DDP = "replicate"
# Here each rank takes the mean over its own batch, which depends on the number of ranks.
MEANS_OF_RANKS = "compat"
Records = dict[str, dict[str, Any]]


def build(name: str) -> tuple[Mlp, nn.Module, KFACPreconditioner]:
    """Return the model, the module to train (DDP for the setting IN_DDP on several ranks), and the preconditioner."""
    torch.manual_seed(3)
    model = Mlp(linear(True))
    arguments = {"factor_update_steps": 2, "inv_update_steps": 3, **SETTINGS[name]}
    kfac = KFACPreconditioner(model, accumulation_steps=2, **arguments)
    in_ddp = name == IN_DDP and dist.is_initialized()
    return model, (DistributedDataParallel(model) if in_ddp else model), kfac


def make_step(
    step: int, model: nn.Module, trained: nn.Module, kfac: KFACPreconditioner, rank: int, world: int
) -> Tensor:
    """Make one step from two micro-batches of this rank's share; return the directions as one vector, fp32."""
    x, targets = data(step, ROWS)
    num_tokens = (targets != -100).sum()
    for part in torch.arange(ROWS).view(2, world, -1)[:, rank]:
        loss = loss_sum(trained, x[part], targets[part])
        (loss * (world / num_tokens)).backward()
    if dist.is_initialized() and trained is model:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
    kfac.step(num_tokens=num_tokens, loss_scale=world)
    directions = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.02 * parameter.grad / directions.norm()
    model.zero_grad()
    return directions


def train(rank: int, world: int) -> Records:
    """Return by setting the directions of all steps, the state at the end, and the directions after a resume."""
    records: Records = {}
    for name in SETTINGS:
        model, trained, kfac = build(name)
        directions = []
        for step in range(NUM_STEPS):
            if step == SAVED_AT:
                state = kfac.state_dict()
                weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            directions.append(make_step(step, model, trained, kfac, rank, world))
        report = kfac.report()
        end = kfac.state_dict()
        kfac.close()
        model, trained, kfac = build(name)
        model.load_state_dict(weights)
        kfac.load_state_dict(state)
        resumed = [make_step(step, model, trained, kfac, rank, world) for step in range(SAVED_AT, NUM_STEPS)]
        records[name] = {
            "directions": directions, "resumed": resumed, "state": end, "owners": report.owners,
            "bytes": report.factor_bytes + report.inverse_bytes,
        }  # fmt: skip
    return records


def train_with_an_idle_rank(rank: int, world: int) -> Tensor:
    """Return the directions of a step in which only rank 0 has a batch."""
    model, _, kfac = build("owner")
    x, targets = data(0, ROWS)
    num_tokens = (targets != -100).sum()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if rank == 0:
        (loss_sum(model, x, targets) / num_tokens).backward()
    if world > 1:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
    kfac.step(num_tokens=num_tokens)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Records]:
    """Records of every rank, by (number of ranks, rank)."""
    folder = tmp_path_factory.mktemp("ranks")
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(folder)], env={**os.environ, "PYTHONPATH": path}
        )
        for world in SIZES
        for rank in range(world)
    ]
    try:
        codes = [process.wait(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * len(processes)
    return {
        (world, rank): torch.load(folder / f"{world}.{rank}.pt", weights_only=True)
        for world in SIZES
        for rank in range(world)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - {MEANS_OF_RANKS}))
@pytest.mark.parametrize("world", SIZES[1:])
def test_directions_when_ranks_share_the_batch_then_are_those_of_one_rank(
    records: dict[tuple[int, int], Records], world: int, name: str
) -> None:
    alone = records[1, 0][name]["directions"]
    for rank in range(world):
        for one, other in zip(alone, records[world, rank][name]["directions"], strict=True):
            assert (other - one).norm() < 1e-5 * one.norm()
    for one, other in zip(records[world, 0][name]["directions"], records[world, 1][name]["directions"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - {IN_DDP}))
@pytest.mark.parametrize("world", SIZES)
def test_resume_when_the_number_of_ranks_is_the_same_then_is_bit_identical(
    records: dict[tuple[int, int], Records], world: int, name: str
) -> None:
    record = records[world, world - 1][name]
    for one, other in zip(record["directions"][SAVED_AT:], record["resumed"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("world", SIZES[1:])
def test_directions_when_a_rank_has_no_batch_then_are_those_of_one_rank(
    records: dict[tuple[int, int], Records], world: int
) -> None:
    alone = records[1, 0]["idle"]["directions"]
    for rank in range(world):
        assert (records[world, rank]["idle"]["directions"] - alone).norm() < 1e-5 * alone.norm()


@pytest.mark.slow
def test_state_when_gathered_then_is_the_same_for_any_number_of_ranks(records: dict[tuple[int, int], Records]) -> None:
    alone = records[1, 0]["inverse"]["state"]
    for world, rank in records:
        state = records[world, rank]["inverse"]["state"]
        assert state.keys() == alone.keys()
        for key, value in alone.items():
            if isinstance(value, str):
                assert state[key] == value
                continue
            torch.testing.assert_close(torch.as_tensor(state[key]), torch.as_tensor(value), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_memory_when_ranks_own_layers_then_is_divided_and_with_replicate_it_is_not(
    records: dict[tuple[int, int], Records],
) -> None:
    num_bytes = records[1, 0]["owner"]["bytes"]
    assert sum(records[2, rank]["owner"]["bytes"] for rank in range(2)) == num_bytes
    assert set(records[2, 0]["owner"]["owners"].values()) == {0, 1}
    assert [records[2, rank]["replicate"]["bytes"] for rank in range(2)] == [num_bytes, num_bytes]


def test_owners_when_assigned_then_the_most_expensive_layers_have_different_ranks() -> None:
    sizes = [10, 10, 9, 3, 3, 2]
    layers = [Layer(str(n), nn.Identity(), size, size, False, False) for n, size in enumerate(sizes)]
    owners = assign(layers, 3)
    assert len(set(owners[:3])) == 3
    assert owners[3:] == [owners[2]] * 3  # all small ones together cost less than the difference of 10^3 and 9^3
    assert assign(layers, 1) == [0] * 6


def test_offsets_when_layers_differ_then_every_step_has_about_the_same_work() -> None:
    sizes = [4, 9, 5, 9, 3, 9, 9, 8, 5]
    layers = [Layer(str(n), nn.Identity(), size, size, False, False) for n, size in enumerate(sizes)]
    work = [0] * 5
    for size, offset in zip(sizes, refresh_offsets(layers), strict=True):
        work[int(5 * offset)] += size**3
    assert sum(work) == sum(size**3 for size in sizes)
    assert max(work) <= sum(work) / 5 + 9**3
    assert min(work) > 0
    # A smaller layer is later, and equal layers are in the order of the model, as a group of them needs.
    offsets = refresh_offsets(layers)
    assert [offsets[n] for n in (1, 3, 5, 6, 7, 2, 8, 0, 4)] == sorted(offsets)


if __name__ == "__main__":
    this_rank = int(sys.argv[1])
    num_ranks = int(sys.argv[2])
    results = Path(sys.argv[3])
    torch.set_num_threads(1)
    if num_ranks > 1:
        dist.init_process_group(
            "gloo", f"file://{results}/rendezvous.{num_ranks}", rank=this_rank, world_size=num_ranks
        )
    all_records = train(this_rank, num_ranks)
    all_records["idle"] = {"directions": train_with_an_idle_rank(this_rank, num_ranks)}
    torch.save(all_records, results / f"{num_ranks}.{this_rank}.pt")
    if num_ranks > 1:
        dist.destroy_process_group()
