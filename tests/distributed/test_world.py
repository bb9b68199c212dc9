"""Ranks that agree: three real processes over gloo, as one process on a first node and two on a second.

This file is also the program that each process runs; see `rank_program`.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llm.config.errors import Stopped, UsageError, UserError
from llm.distributed import world as world_module
from llm.distributed.world import World, launched_size

NODES = [0, 0, 1]  # local ranks: rank 0 is alone on its node
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
Answers = dict[str, list[Any]]


def attempt(work: Callable[[], object]) -> object:
    """Return the result of `work`, or its error as a list of its parts."""
    try:
        return work()
    except (UserError, Stopped) as error:
        return [type(error).__name__, str(error), error.exit_code, error.reported_elsewhere]


def rank_program(world: World, folder: Path) -> None:
    """Call every method of `World`; write each answer of this rank to a file as soon as it is known."""

    def note(name: str, work: Callable[[], object]) -> None:
        (folder / f"{name}.{world.rank}.json").write_text(json.dumps(attempt(work)))

    def fail(error: BaseException, *, on: int = 0) -> str:
        if world.rank == on:
            raise error
        return "done"

    def take_turn() -> list[float]:
        started = time.monotonic()
        time.sleep(0.2)
        return [started, time.monotonic()]

    note("sum", lambda: world.all_reduce_sum(torch.tensor([1.0, 10.0]) * (world.rank + 1)).tolist())
    note("sum_integers", lambda: world.all_reduce_sum(torch.tensor(2**40 + world.rank)).item())
    note("broadcast", lambda: world.broadcast({"from": world.rank, "none": None}))
    note("is_main", lambda: world.is_main)
    note("run_on_main", lambda: world.run_on_main(lambda: f"of {world.rank}"))
    note("run_on_main_user_error", lambda: world.run_on_main(lambda: fail(UserError("no text"))))
    note("run_on_main_usage_error", lambda: world.run_on_main(lambda: fail(UsageError("no such\noption"))))
    note("run_on_main_stop", lambda: world.run_on_main(lambda: fail(Stopped("SIGTERM"))))
    note("after_errors", lambda: world.all_reduce_sum(torch.ones(())).item())
    polled = iter([None, None, 5])
    note("wait", lambda: world.poll_on_main(lambda: next(polled), "a number", lambda: False))
    note("wait_stopped", lambda: world.poll_on_main(lambda: None, "nothing", lambda: world.rank == 2))
    note("wait_error", lambda: world.poll_on_main(lambda: fail(UserError("broke")), "nothing", lambda: False))
    note("main_first", lambda: world.main_first("turn", take_turn))
    world.barrier()
    note("main_first_own_error", lambda: world.main_first("own", lambda: fail(UserError("full disk"), on=2)))
    note("main_first_stop", lambda: world.main_first("stop", lambda: fail(Stopped("SIGTERM"), on=1)))
    note("launched_size", launched_size)
    note("main_first_error", lambda: world.main_first("wrong", lambda: fail(UsageError("line 2\nline 3"))))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Return the answers by name, in the order of the ranks; None stands for a rank that hung or died."""
    folder = tmp_path_factory.mktemp("ranks")
    path = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "WORLD_SIZE": str(len(NODES)), "PYTHONPATH": os.pathsep.join(filter(None, path))}
    started = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment)
        for rank in range(len(NODES))
    ]
    for process, patience in zip(started, (60, 10, 10), strict=True):  # they end together, or one hangs
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    names = {file.name.split(".")[0] for file in folder.glob("*.json")}
    answers: Answers = {name: [None] * len(NODES) for name in names}
    for name in names:
        for rank in range(len(NODES)):
            file = folder / f"{name}.{rank}.json"
            if file.exists():
                answers[name][rank] = json.loads(file.read_text())
    return answers


def test_all_reduce_sum_when_called_then_every_rank_has_the_sum_over_all(answers: Answers) -> None:
    assert answers["sum"] == [[6.0, 60.0]] * 3
    assert answers["sum_integers"] == [3 * 2**40 + 3] * 3  # integers stay exact


def test_broadcast_when_called_then_every_rank_has_the_value_of_rank_0(answers: Answers) -> None:
    assert answers["broadcast"] == [{"from": 0, "none": None}] * 3
    assert answers["is_main"] == [True, False, False]
    assert answers["launched_size"] == [3, 3, 3]


def test_run_on_main_when_called_then_runs_on_rank_0_alone(answers: Answers) -> None:
    assert answers["run_on_main"] == ["of 0"] * 3


@pytest.mark.parametrize(
    ("name", "kind", "message", "code"),
    [("user", "UserError", "no text", 1), ("usage", "UsageError", "no such\noption", 2)],
)
def test_run_on_main_when_the_work_fails_then_all_ranks_raise_and_only_rank_0_reports(
    answers: Answers, name: str, kind: str, message: str, code: int
) -> None:
    assert answers[f"run_on_main_{name}_error"] == [[kind, message, code, rank > 0] for rank in range(3)]
    assert answers["after_errors"] == [3.0] * 3  # no rank is one collective ahead


def test_work_when_stopped_on_one_rank_then_stops_on_all_and_only_that_rank_reports(answers: Answers) -> None:
    for name, first in (("run_on_main_stop", 0), ("main_first_stop", 1)):
        assert answers[name] == [["Stopped", "SIGTERM", 75, rank != first] for rank in range(3)]


def test_poll_on_main_when_there_is_a_value_then_all_ranks_get_it(answers: Answers) -> None:
    assert answers["wait"] == [5] * 3
    assert answers["wait_error"] == [["UserError", "broke", 1, rank > 0] for rank in range(3)]


def test_poll_on_main_when_another_rank_is_asked_to_stop_then_all_ranks_get_none(answers: Answers) -> None:
    assert answers["wait_stopped"] == [None] * 3
    assert ALONE.poll_on_main(lambda: None, "nothing", lambda: True) is None


def test_main_first_when_all_work_then_rank_0_is_first_and_each_node_starts_with_its_local_rank_0(
    answers: Answers,
) -> None:
    (_, first_end), (second_start, second_end), (third_start, _) = answers["main_first"]
    assert first_end <= second_start
    assert second_end <= third_start


def test_main_first_when_rank_0_fails_then_every_rank_raises_and_none_hangs(answers: Answers) -> None:
    first, *others = answers["main_first_error"]
    assert first == ["UsageError", "line 2\nline 3", 2, False]
    assert others == [["UserError", "line 2\nline 3", 2, True]] * 2


def test_main_first_when_the_last_rank_fails_then_all_raise_and_only_that_rank_reports(answers: Answers) -> None:
    assert answers["main_first_own_error"] == [["UserError", "full disk", 1, rank != 2] for rank in range(3)]


def test_world_when_it_has_one_process_then_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    tensor = torch.ones(2)
    assert ALONE.all_reduce_sum(tensor) is tensor
    assert tensor.tolist() == [1, 1]
    value = object()
    assert ALONE.broadcast(value) is value
    assert ALONE.main_first("anything", lambda: 7) == ALONE.run_on_main(lambda: 7) == 7
    ALONE.barrier()
    with pytest.raises(UserError) as failure:
        ALONE.run_on_main(lambda: (_ for _ in ()).throw(UserError("no text")))
    assert not failure.value.reported_elsewhere


def test_console_when_another_rank_than_0_waits_then_shows_what_it_waits_for_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm.training.run_dir.console import setup_logging, teardown_logging  # here: the rank programs do without it

    num_checks = itertools.count()

    class Store:
        """Stands for the process group's store: rank 0 has finished from the third look on."""

        def check(self, keys: list[str]) -> bool:
            return not keys[0].endswith("/error") and next(num_checks) >= 2

        def set(self, key: str, value: str) -> None:
            pass

    monkeypatch.setattr(world_module, "_store", Store)
    monkeypatch.setattr(world_module, "_HEARTBEAT_SECONDS", 0.3)  # two polls take 0.4 s
    setup_logging(is_main=False, rank=1)
    try:
        logging.getLogger("llm.data.dataset").warning("a line that rank 0 logs too")
        assert World(rank=1, size=2, local_rank=1, device=torch.device("cpu")).main_first("the text", lambda: 7) == 7
    finally:
        teardown_logging()
    assert capsys.readouterr().err == "[rank 1] rank 1 waits for the text (0 min)\n"


def test_launched_size_when_there_is_no_launcher_then_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched_size() == 1


if __name__ == "__main__":
    this_rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=this_rank, world_size=len(NODES))
    rank_program(World(this_rank, len(NODES), NODES[this_rank], torch.device("cpu")), folder)
    dist.destroy_process_group()
