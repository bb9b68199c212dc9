"""Mixtures of texts by weight."""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from llm.config.errors import UserError
from llm.data.batches.blocks import Blocks, cut_blocks
from llm.data.batches.ledger import ledger
from llm.data.batches.mixture import Mixture, mix
from llm.data.shards.document_starts import ConcatenatedStarts, StartsAfterEos
from llm.data.shards.format import SplitTokens, TokenizedText
from llm.data.shards.memmap import TokenFile, Tokens

BLOCK = 4
WEIGHTS = [
    ("0.7", "0.3"),
    ("1", "1"),
    ("0.999", "0.001"),
    ("1", "2", "3"),
    ("0.5", "0.25", "0.125", "0.125"),
    ("1",) * 7,
    ("0.9", "0.05", "0.03", "0.02"),
    ("1", "1", "2", "3", "5", "8", "13"),
]


def _blocks(number: int, first: int = 0) -> Blocks:
    return Blocks(np.arange(first, first + number * BLOCK + 1), BLOCK)


def _mixture(weights: tuple[str, ...], sizes: tuple[int, ...] | None = None) -> Mixture:
    """Mix sources; the blocks of source i hold the ids from 10,000 i on."""
    sources = [_blocks(size, 10_000 * i) for i, size in enumerate(sizes or (11,) * len(weights))]
    return Mixture(sources, [Fraction(weight) for weight in weights])


@pytest.mark.parametrize("weights", WEIGHTS, ids="/".join)
def test_mixture_when_read_from_the_start_then_shares_within_a_block_and_counted_at_once(
    weights: tuple[str, ...],
) -> None:
    mixture = _mixture(weights)
    total = sum(map(Fraction, weights))
    assert mixture.shares == tuple(Fraction(weight) / total for weight in weights)
    counts: Counter[int] = Counter()
    for sample in range(3000):
        source, number = mixture.locate(sample)
        assert number == counts[source]  # its samples are counted without a gap
        counts[source] += 1
        for i, share in enumerate(mixture.shares):
            assert abs(counts[i] - share * (sample + 1)) <= (Fraction(1, 2) if len(weights) == 2 else 1)
        if sample % 500 == 0:
            assert mixture.num_samples(sample + 1) == [counts[i] for i in range(len(weights))]
    far = 10**15
    for share, count in zip(mixture.shares, mixture.num_samples(far), strict=True):
        assert abs(count - share * far) <= 1


def test_mixture_when_read_then_every_block_of_a_text_once_in_each_of_its_epochs() -> None:
    sizes = (23, 7, 40)
    mixture = _mixture(("0.5", "0.3", "0.2"), sizes)
    blocks_read: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for sample in range(500):
        row = mixture.block(sample, 3)
        source = int(row.ids[0]) // 10_000
        blocks_read[source].append(int(row.ids[0]) % 10_000 // BLOCK)
    for source, size in enumerate(sizes):
        epochs = [blocks_read[source][i : i + size] for i in range(0, len(blocks_read[source]) - size + 1, size)]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert mixture.num_blocks == 70
    assert mixture.num_epochs(500) == [250 / 23, 150 / 7, 100 / 40]


def test_mixture_when_no_weights_then_an_epoch_reads_every_block_once() -> None:
    mixture = Mixture([_blocks(23), _blocks(7, 10_000), _blocks(1, 20_000)], [None, None, None])
    assert mixture.num_samples(mixture.num_blocks) == [23, 7, 1]
    rows = {int(mixture.block(sample, 5).ids[0]) for sample in range(31)}
    assert len(rows) == 31
    assert mixture.num_unread(31) == 0
    assert mixture.num_unread(0) == 31
    assert _mixture(("0.9", "0.1"), (10, 10)).num_unread(20) == 8


def test_mixture_when_read_again_then_the_same_and_each_text_has_an_order_of_its_own() -> None:
    mixture = _mixture(("0.5", "0.5"), (300, 300))
    again = pickle.loads(pickle.dumps(mixture))

    def order(of: Mixture, seed: int) -> list[int]:
        return [int(of.block(sample, seed).ids[0]) for sample in range(600)]

    assert order(again, 3) == order(mixture, 3)
    assert again.block(417, 3).ids.tolist() == mixture.block(417, 3).ids.tolist()
    assert order(mixture, 4) != order(mixture, 3)
    first = [block for block in order(mixture, 3) if block < 10_000]
    second = [block - 10_000 for block in order(mixture, 3) if block >= 10_000]
    assert sorted(first) == sorted(second)
    assert first != second


def test_mixture_when_distributed_then_equal_to_recorded_values() -> None:
    # Runs are resumed by it: these numbers must never change.
    mixture = _mixture(("0.5", "0.3", "0.2"), (100, 100, 100))
    assert [mixture.locate(sample)[0] for sample in range(20)] == [1, 0, 2, 0, 1, 0, 2, 0, 1, 0] * 2
    assert [int(mixture.block(sample, 7).ids[0]) for sample in range(6)] == [10364, 368, 20392, 0, 10388, 132]


def _streams(tmp_path: Path, name: str, num_tokens: int, held_out: int, *, num_bytes: int | None = 5) -> TokenizedText:
    np.arange(num_tokens + held_out).astype("<u2").tofile(tmp_path / name)
    tokens = Tokens([TokenFile(tmp_path / name, "<u2", num_tokens + held_out)])

    def stream(start: int, stop: int) -> SplitTokens:
        part = tokens.sliced(start, stop)
        return SplitTokens(part, 3, num_bytes, StartsAfterEos(part, 6) if num_bytes else None)

    validation = stream(num_tokens, num_tokens + held_out) if held_out else None
    return TokenizedText(stream(0, num_tokens), validation, {"empty": 2}, f"hash of {name}", 60_000, tmp_path, name)


def test_mix_when_texts_are_mixed_then_counts_are_summed_and_validation_is_concatenated(tmp_path: Path) -> None:
    one, two = _streams(tmp_path, "a", 42, 10), _streams(tmp_path, "b", 21, 20)
    streams = mix(["A", "B"], [Fraction(1, 4), Fraction(3, 4)], [one, two])
    assert streams.validation is not None
    assert streams.validation.tokens[:].tolist() == [*range(42, 52), *range(21, 41)]
    assert (streams.validation.num_documents, streams.validation.num_bytes) == (6, 10)
    assert isinstance(streams.validation.starts, ConcatenatedStarts)
    assert streams.validation.starts.between(0, 30).tolist() == [0, 10]
    assert (len(streams.train.tokens), streams.skipped, streams.name) == (63, {"empty": 4}, "a + b")
    train, validation = cut_blocks(streams, 8)
    assert isinstance(train, Mixture)
    assert train.num_blocks == 5 + 2
    assert validation is not None and len(validation) == 3
    counts = ledger(streams, 8)
    assert (counts.train_tokens, counts.dropped_train, counts.total) == (41 + 17, 1 + 4, 42 + 21 + 30)
    unknown = mix(["A", "B"], [None, None], [one, _streams(tmp_path, "c", 21, 20, num_bytes=None)])
    assert unknown.validation is not None
    assert unknown.validation.num_bytes is unknown.validation.starts is None
    assert mix(["A"], [None], [_streams(tmp_path, "d", 9, 0)]).validation is None


def test_mix_when_order_or_weights_differ_then_another_hash(tmp_path: Path) -> None:
    one, two = _streams(tmp_path, "a", 42, 10), _streams(tmp_path, "b", 21, 20)
    half = Fraction(1, 2)
    hashes = {
        mix(["A", "B"], weights, texts).data_hash
        for weights in ([half, half], [None, None], [Fraction(1, 3), Fraction(2, 3)])
        for texts in ([one, two], [two, one])
    }
    assert len(hashes) == 6
    assert mix(["C", "D"], [half, half], [one, two]).data_hash in hashes


def test_cut_blocks_when_a_source_has_no_block_then_it_is_named(tmp_path: Path) -> None:
    streams = mix(["A", "some/B"], [None, None], [_streams(tmp_path, "a", 42, 10), _streams(tmp_path, "b", 8, 0)])
    with pytest.raises(UserError, match="--train_dir some/B has 8 tokens, and a block of --block_size 8 needs 9"):
        cut_blocks(streams, 8)
