"""The trainer under an updater that it does not know: everything goes through the `Updater` protocol, on all ranks.

One pair of processes runs all scenarios, one after another; see `sharded_trainer.py`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import Outcome
from tests.trainers.test_gpt import Train, records
from tests.training.sharded_trainer import Scenario, copy_run, sharded_updaters

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
NUM_RANKS = 2
NUM_STEPS = 12
VERBS = {"update", "evaluation_model", "full_weights", "state", "gather"}
STOPS = (1, 6, 9)  # in an update, in an evaluation, while sampling


@pytest.fixture(scope="module")
def options(tiny_command: tuple[str, ...]) -> list[str]:
    """A run that records, evaluates, samples and saves; 3 evaluation batches for 2 ranks."""
    return [
        *tiny_command,
        *("--optim", "sgd", "--adam_beta1", "0.9", "--weight_decay", "0", "--max_grad_norm", "0"),
        *("--learning_rate", "0.05", "--lr_scheduler_type", "constant"),
        *("--max_train_steps", str(NUM_STEPS), "--logging_steps", "1", "--eval_steps", "4", "--sample_steps", "6"),
        *("--checkpointing_steps", "4", "--per_device_eval_batch_size", "4", "--max_eval_batches", "3"),
    ]


@pytest.fixture(scope="module")
def runs(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all scenarios on two ranks; return the folder of their results."""
    folder = tmp_path_factory.mktemp("scenarios")
    sharded = [*options, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    synchronous = [*options, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"]
    with ExitStack() as stack:
        ports = free_ports(stack)
        scenarios = [
            Scenario("sharded", next(ports), sharded),
            Scenario("resumed", next(ports), sharded, continues="sharded", from_step=8),
            *(Scenario(f"stopped_{number}", next(ports), sharded, stop_at=number) for number in STOPS),
            Scenario("rare_votes", next(ports), sharded, votes_every=3, stop_at=2),
            Scenario("rare_votes_resumed", next(ports), sharded, votes_every=3, continues="rare_votes"),
            Scenario("synchronous", next(ports), synchronous, is_synchronous=True),
            # Between the first and the second micro-batch of some update, on rank 1 alone.
            Scenario("cut", next(ports), synchronous, is_synchronous=True, stop_at=9),
            Scenario("cut_resumed", next(ports), synchronous, is_synchronous=True, continues="cut"),
        ]
    (folder / "scenarios.json").write_text(json.dumps([asdict(scenario) for scenario in scenarios]))
    run_ranks(folder)
    return folder


def free_ports(stack: ExitStack) -> Iterator[int]:
    """Yield ports that are free; each is held until the stack ends, so that none comes twice."""
    while True:
        held = stack.enter_context(socket.socket())
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def run_ranks(folder: Path) -> None:
    """Run the program on all ranks, and fail with the end of their output if one fails or hangs."""
    processes = []
    for rank in range(NUM_RANKS):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS, "LOCAL_WORLD_SIZE": NUM_RANKS}
        environment = os.environ | {name: str(number) for name, number in numbers.items()}
        environment["MASTER_ADDR"] = "127.0.0.1"
        command = [sys.executable, "-m", "tests.training.sharded_trainer", str(folder / "scenarios.json")]
        with open(folder / f"rank_{rank}.out", "w") as out:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
    try:
        codes = [process.wait(330) for process in processes]
    except subprocess.TimeoutExpired:
        codes = []
    finally:
        for process in processes:
            process.kill()
    if codes != [0] * NUM_RANKS:
        pytest.fail("\n".join((folder / f"rank_{rank}.out").read_text()[-3000:] for rank in range(NUM_RANKS)))


def answers(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return exit code and calls of every rank in a scenario."""
    return [json.loads((folder / f"{name}.rank_{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def equal_calls(folder: Path, name: str, code: int) -> dict[str, int]:
    """Check that all ranks ended with this code and made the same calls; return how many of each."""
    first, *others = answers(folder, name)
    assert first["code"] == code
    assert all(other == first for other in others)
    calls: dict[str, int] = first["calls"]
    return calls


def values(folder: Path, key: str = "loss") -> list[Any]:
    return [record[key] for record in records(folder) if key in record]


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "all_results.json").read_text())
    return content


def status(folder: Path) -> tuple[str, int, int]:
    content = json.loads((folder / "status.json").read_text())
    return content["state"], content["step"], content["exit_code"]


def saved(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def on_one_rank(options: list[str]) -> list[str]:
    """The same global batch on one rank."""
    return [*options, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]


def test_run_when_the_updater_shards_weights_then_trains_evaluates_samples_and_exports_like_the_synchronous_one(
    runs: Path, train: Train, options: list[str], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    assert train(*on_one_rank(options), "--output_dir", plain).code == 0
    sharded = runs / "sharded"
    for key in ("loss", "eval_loss"):
        assert values(sharded, key) == pytest.approx(values(plain, key), rel=1e-5)
    assert values(sharded, "samples") == values(plain, "samples")
    assert results(sharded)["num_eval_tokens"] == results(plain)["num_eval_tokens"]
    expected = load_file(plain / "model.safetensors")
    weights = load_file(sharded / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(sharded)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_run_when_the_updater_shards_weights_then_every_method_is_called_equally_often_on_all_ranks(
    runs: Path,
) -> None:
    calls = equal_calls(runs, "sharded", 0)
    assert calls.keys() >= VERBS
    assert calls["update"] == NUM_STEPS
    log = (runs / "sharded" / "log.txt").read_text()
    assert "sharded: begins on 2 ranks" in log
    assert "sharded: ended on 2 ranks" in log


def test_run_when_resumed_on_two_ranks_then_continues_from_the_shards(runs: Path) -> None:
    calls = equal_calls(runs, "resumed", 0)
    assert (calls["load"], calls["update"]) == (1, NUM_STEPS - 8)
    assert "resumed from step 8" in (runs / "resumed" / "log.txt").read_text()
    assert values(runs / "resumed") == pytest.approx(values(runs / "sharded"), rel=1e-5)


def test_run_when_resumed_on_one_rank_then_reads_the_shards_of_two(
    runs: Path, train: Train, options: list[str], tmp_path: Path
) -> None:
    copy_run(runs / "sharded", tmp_path / "run", 8)
    with sharded_updaters() as updaters:
        outcome: Outcome = train(*on_one_rank(options), "--output_dir", tmp_path / "run", "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert "resumed from step 8" in outcome.out
    assert (updaters[0].size, updaters[0].calls["load"]) == (1, 1)
    assert values(tmp_path / "run") == pytest.approx(values(runs / "sharded"), rel=1e-5)


@pytest.mark.parametrize("number", STOPS)
def test_run_when_one_rank_alone_is_asked_to_stop_then_no_rank_skips_a_pass_and_all_is_saved(
    runs: Path, number: int
) -> None:
    equal_calls(runs, f"stopped_{number}", 75)
    state, step, code = status(runs / f"stopped_{number}")
    assert (state, code) == ("stopped", 75)
    assert f"step_{step}" in saved(runs / f"stopped_{number}")


def test_run_when_votes_are_exchanged_in_every_third_update_then_stops_and_saves_all_the_same(runs: Path) -> None:
    equal_calls(runs, "rare_votes", 75)
    assert status(runs / "rare_votes") == ("stopped", 3, 75)
    # A save that follows from the number of the update needs no vote.
    equal_calls(runs, "rare_votes_resumed", 0)
    assert {"step_3", "step_4", "step_8", "step_12"} <= saved(runs / "rare_votes_resumed")


def test_synchronous_run_when_one_rank_is_asked_to_stop_between_micro_batches_then_both_abandon_the_update(
    runs: Path,
) -> None:
    equal_calls(runs, "cut", 75)
    state, step, _ = status(runs / "cut")
    assert state == "stopped"
    assert 0 < step < NUM_STEPS
    equal_calls(runs, "cut_resumed", 0)
    assert values(runs / "cut_resumed") == values(runs / "synchronous")
