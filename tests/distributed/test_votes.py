"""Votes of real ranks over gloo."""

from __future__ import annotations

from pathlib import Path

import torch

from llm.distributed.votes import DelayedVote
from llm.distributed.world import World
from tests.ranks import run_ranks

NUM_RANKS = 3
# Votes of the ranks in each call.
BALLOTS = [
    (False, False, False),
    (False, True, False),
    (True, False, False),
    (True, True, True),
    (False, False, False),
    (False, False, True),
]


def rank_program(world: World) -> list[bool]:
    """Cast this rank's votes; return the answers of `last`, of each call, and of `last` twice."""
    vote = DelayedVote(world)
    return [vote.last(), *(vote(ballot[world.rank]) for ballot in BALLOTS), vote.last(), vote.last()]


def test_vote_when_any_rank_votes_yes_then_all_ranks_know_it_one_call_later(tmp_path: Path) -> None:
    before_the_first_call = [False]
    of_calls = [False, False, True, True, True, False]
    of_last = [True, False]
    assert run_ranks(rank_program, tmp_path, NUM_RANKS) == [[*before_the_first_call, *of_calls, *of_last]] * NUM_RANKS


def test_vote_when_there_is_one_process_then_the_vote_is_the_answer() -> None:
    vote = DelayedVote(World(rank=0, size=1, local_rank=0, device=torch.device("cpu")))
    assert [vote(False), vote(True), vote(False)] == [False, True, False]
    assert vote.last() is False
