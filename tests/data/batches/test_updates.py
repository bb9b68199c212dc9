"""The global batches of a run's first 201 updates, however it is split and wherever it is continued."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import TypeAlias

import numpy as np
import pytest

from llm.data.batches.blocks import Blocks
from llm.data.batches.loader import Batch, BlockSource, training_batches
from llm.data.batches.mixture import Mixture
from llm.data.shards.document_starts import StartsAfterEos

BLOCK, GLOBAL_BATCH, NUM_STEPS, RESUMED_AT = 8, 8, 201, 137
EOS = 5
Rows: TypeAlias = list[list[list[int]]]


def _blocks(seed: int, number: int, *, masked: bool = False) -> Blocks:
    ids = np.random.default_rng(seed).integers(0, 50, number * BLOCK + 1)
    return Blocks(ids, BLOCK, starts=StartsAfterEos(ids, EOS) if masked else None)


def _mixture(*, masked: bool = False) -> Mixture:
    sources = [_blocks(seed, number, masked=masked) for seed, number in ((1, 531), (2, 60), (3, 222))]
    return Mixture(sources, [Fraction(weight) for weight in ("0.6", "0.1", "0.3")])


# The run reads more than one epoch of each.
TEXTS: dict[str, BlockSource] = {
    "blocks": _blocks(0, 700),
    "blocks, masked": _blocks(0, 700, masked=True),
    "mixture": _mixture(),
    "mixture, masked": _mixture(masked=True),
}


def _rows(batch: Batch) -> list[list[int]]:
    """Of each block its ids, targets and positions, in one list."""
    parts = [batch.ids, batch.targets, *([] if batch.positions is None else [batch.positions])]
    return [[number for part in parts for number in part[i].tolist()] for i in range(len(batch.ids))]


def _updates(text: str, num_ranks: int, accumulation: int, num_workers: int, first_step: int = 0) -> Rows:
    """The rows of each update, in the order of the global batch."""
    ranks = [
        list(
            training_batches(
                TEXTS[text],
                seed=11,
                first_step=first_step,
                num_steps=NUM_STEPS - first_step,
                micro_batch=GLOBAL_BATCH // num_ranks // accumulation,
                accumulation=accumulation,
                rank=rank,
                num_ranks=num_ranks,
                num_workers=num_workers,
            )
        )
        for rank in range(num_ranks)
    ]
    assert all(len(updates) == NUM_STEPS - first_step for updates in ranks)
    return [
        [row for place in range(accumulation) for updates in ranks for row in _rows(updates[step][place])]
        for step in range(NUM_STEPS - first_step)
    ]


@cache
def _expected(text: str) -> Rows:
    return _updates(text, 1, 1, 0)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("num_ranks", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("text", TEXTS)
def test_updates_when_split_over_ranks_and_workers_and_resumed_then_the_same_ids(
    text: str, num_ranks: int, accumulation: int, num_workers: int
) -> None:
    if num_workers and accumulation == 1 and num_ranks > 1:
        pytest.skip("the other splits show the same")
    expected = _expected(text)
    assert {len(update) for update in expected} == {GLOBAL_BATCH}
    assert len(expected[0][0]) == BLOCK * (3 if "masked" in text else 2)
    if not num_workers:
        assert _updates(text, num_ranks, accumulation, num_workers) == expected
    assert _updates(text, num_ranks, accumulation, num_workers, RESUMED_AT) == expected[RESUMED_AT:]


@pytest.mark.parametrize("text", TEXTS)
def test_updates_when_read_by_workers_from_the_start_then_the_same_ids(text: str) -> None:
    assert _updates(text, 2, 2, 2) == _expected(text)


def test_updates_when_documents_are_kept_apart_then_the_same_blocks() -> None:
    for text in ("blocks", "mixture"):
        plain, masked = _expected(text), _expected(f"{text}, masked")
        assert [[row[:BLOCK] for row in update] for update in plain] == [
            [row[:BLOCK] for row in update] for update in masked
        ]
