"""Votes of two real processes over gloo; this file is also the program that each process runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llm.distributed.votes import DelayedVote
from llm.distributed.world import World

NUM_RANKS = 2
# Votes of the ranks in each call.
BALLOTS = [(False, False), (False, True), (True, False), (True, True), (False, False)]


def rank_program(rank: int, folder: Path) -> None:
    """Cast this rank's votes, and write the answers to a file: of each call, of `last`, and of `last` once more."""
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    vote = DelayedVote(World(rank=rank, size=NUM_RANKS, local_rank=rank, device=torch.device("cpu")))
    answers = [vote.last(), *(vote(ballot[rank]) for ballot in BALLOTS), vote.last(), vote.last()]
    (folder / f"{rank}.json").write_text(json.dumps(answers))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("is_yes", [True, False])
def test_vote_when_there_is_one_process_then_the_vote_is_the_answer(is_yes: bool) -> None:
    vote = DelayedVote(World(rank=0, size=1, local_rank=0, device=torch.device("cpu")))

    assert vote(is_yes) is is_yes
    assert vote.last() is False


def test_vote_when_any_rank_votes_yes_then_both_ranks_know_it_one_call_later(tmp_path: Path) -> None:
    path = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(NUM_RANKS)]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0] * NUM_RANKS

    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    before_the_first_call = [False]
    of_calls = [False, False, True, True, True]
    of_last = [False, False]
    assert answers == [[*before_the_first_call, *of_calls, *of_last]] * NUM_RANKS


if __name__ == "__main__":
    rank_program(int(sys.argv[1]), Path(sys.argv[2]))
