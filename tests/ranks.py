"""Several ranks over gloo, each in a forked process, for tests of collective functions that need no autograd."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llm.distributed.world import World

_TIMEOUT_SECONDS = 60.0


def run_ranks(work: Callable[[World], Any], folder: Path, num_ranks: int) -> list[Any]:
    """Call `work(world)` on every rank; return the answers, as JSON holds them, by rank.

    A rank that hung or failed has the answer None.

    Args:
        work: called in a forked process, which shares what this one has imported.
        folder: an empty folder.
        num_ranks: number of processes.
    """
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_run_rank, args=(work, folder, rank, num_ranks)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_TIMEOUT_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
    answers = [_answer(folder, rank) for rank in range(num_ranks)]
    return [json.loads(answer.read_text()) if answer.exists() else None for answer in answers]


def _answer(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.json"


def _run_rank(work: Callable[[World], Any], folder: Path, rank: int, num_ranks: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    answer = work(World(rank, num_ranks, rank, torch.device("cpu")))
    _answer(folder, rank).write_text(json.dumps(answer))
    dist.destroy_process_group()
