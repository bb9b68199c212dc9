"""One, two and four ranks on one global batch: real processes over gloo.

This file is also the program that each of them runs; see `train`.
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
NUM_UPDATES, SAVED_AT, ROWS = 6, 3, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "owner": {},
    "replicate": {"strategy": "replicate"},
    "inverse": {"method": "inverse"},
    "stagger": {"stagger": True},
    "clipped": {"rescale": None, "kl_clip": 1e-3, "lr": 0.1},
    "compat": {"compat": "kfac-pytorch", "lr": 1.0},
}
# Its sums are taken in another order once it has seen how the gradients arrive, so that no resume is exact.
IN_DDP = "replicate"
# A mean over a rank's own batch is another mean where the ranks are more.
OWN_MEANS = "compat"
Records = dict[str, dict[str, Any]]


def start(name: str) -> tuple[Mlp, nn.Module, KFACPreconditioner]:
    """The model, what is trained of it (in DDP, where there are ranks and it is asked for), and the preconditioner."""
    torch.manual_seed(3)
    model = Mlp(linear(True))
    arguments = {"factor_update_steps": 2, "inv_update_steps": 3, **SETTINGS[name]}
    kfac = KFACPreconditioner(model, accumulation_steps=2, **arguments)
    in_ddp = name == IN_DDP and dist.is_initialized()
    return model, (DistributedDataParallel(model) if in_ddp else model), kfac


def update(
    number: int, model: nn.Module, trained: nn.Module, kfac: KFACPreconditioner, rank: int, world: int
) -> Tensor:
    """One update from two micro-batches of this rank's share; gives the directions as one vector."""
    x, targets = data(number, ROWS)
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
    """By setting: the directions of all updates, the state at the end, and the directions after a resume."""
    records: Records = {}
    for name in SETTINGS:
        model, trained, kfac = start(name)
        directions = []
        for number in range(NUM_UPDATES):
            if number == SAVED_AT:
                state = kfac.state_dict()
                weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            directions.append(update(number, model, trained, kfac, rank, world))
        report = kfac.report()
        end = kfac.state_dict()
        kfac.close()
        model, trained, kfac = start(name)
        model.load_state_dict(weights)
        kfac.load_state_dict(state)
        resumed = [update(number, model, trained, kfac, rank, world) for number in range(SAVED_AT, NUM_UPDATES)]
        records[name] = {
            "directions": directions, "resumed": resumed, "state": end, "owners": report.owners,
            "bytes": report.factor_bytes + report.inverse_bytes,
        }  # fmt: skip
    return records


def train_with_an_idle_rank(rank: int, world: int) -> Tensor:
    """The directions where rank 0 alone has a batch."""
    model, _, kfac = start("owner")
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
    """What every rank of every world has recorded."""
    folder = tmp_path_factory.mktemp("ranks")
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(folder)], env={**os.environ, "PYTHONPATH": path}
        )
        for world in SIZES
        for rank in range(world)
    ]
    try:
        codes = [process.wait(timeout=150) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * len(started)
    return {
        (world, rank): torch.load(folder / f"{world}.{rank}.pt", weights_only=True)
        for world in SIZES
        for rank in range(world)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - {OWN_MEANS}))
@pytest.mark.parametrize("world", SIZES[1:])
def test_updates_when_the_batch_is_shared_then_are_those_of_one_rank(
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
def test_resume_when_on_as_many_ranks_then_is_bit_identical(
    records: dict[tuple[int, int], Records], world: int, name: str
) -> None:
    record = records[world, world - 1][name]
    for one, other in zip(record["directions"][SAVED_AT:], record["resumed"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("world", SIZES[1:])
def test_updates_when_a_rank_has_no_batch_then_are_those_of_one_rank(
    records: dict[tuple[int, int], Records], world: int
) -> None:
    alone = records[1, 0]["idle"]["directions"]
    for rank in range(world):
        assert (records[world, rank]["idle"]["directions"] - alone).norm() < 1e-5 * alone.norm()


@pytest.mark.slow
def test_state_when_gathered_then_is_the_same_whatever_the_ranks(records: dict[tuple[int, int], Records]) -> None:
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
def test_memory_when_ranks_own_layers_then_is_shared_and_else_is_not(
    records: dict[tuple[int, int], Records],
) -> None:
    whole = records[1, 0]["owner"]["bytes"]
    assert sum(records[2, rank]["owner"]["bytes"] for rank in range(2)) == whole
    assert set(records[2, 0]["owner"]["owners"].values()) == {0, 1}
    assert [records[2, rank]["replicate"]["bytes"] for rank in range(2)] == [whole, whole]


def test_owners_when_assigned_then_the_dearest_layers_are_apart() -> None:
    sizes = [10, 10, 9, 3, 3, 2]
    layers = [Layer(str(n), nn.Identity(), size, size, False, False) for n, size in enumerate(sizes)]
    owners = assign(layers, 3)
    assert len(set(owners[:3])) == 3
    assert owners[3:] == [owners[2]] * 3  # all small ones together cost less than what 9 falls short of 10
    assert assign(layers, 1) == [0] * 6


def test_delays_when_layers_differ_then_every_update_has_about_the_same_to_do() -> None:
    sizes = [4, 9, 5, 9, 3, 9, 9, 8, 5]
    layers = [Layer(str(n), nn.Identity(), size, size, False, False) for n, size in enumerate(sizes)]
    work = [0] * 5
    for size, delay in zip(sizes, refresh_offsets(layers), strict=True):
        work[int(5 * delay)] += size**3
    assert sum(work) == sum(size**3 for size in sizes)
    assert max(work) <= sum(work) / 5 + 9**3
    assert min(work) > 0
    # A smaller one is later, and equal ones are in the order of the model, as a stack of them wants.
    waits = refresh_offsets(layers)
    assert [waits[n] for n in (1, 3, 5, 6, 7, 2, 8, 0, 4)] == sorted(waits)


if __name__ == "__main__":
    own_rank, num_ranks, results = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if num_ranks > 1:
        dist.init_process_group("gloo", f"file://{results}/meet.{num_ranks}", rank=own_rank, world_size=num_ranks)
    found = train(own_rank, num_ranks) | {"idle": {"directions": train_with_an_idle_rank(own_rank, num_ranks)}}
    torch.save(found, results / f"{num_ranks}.{own_rank}.pt")
    if num_ranks > 1:
        dist.destroy_process_group()
