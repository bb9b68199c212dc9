"""Tests with SIGKILL at random instants: every resume works, no saved step is lost, and the run ends bit-identical."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.campaign import differences, run_killed, run_uninterrupted

# Number of ranks and options. Each configuration has its own state to restore; the text has a little over 21 blocks.
CONFIGURATIONS: dict[str, tuple[int, list[str]]] = {
    "dropout": (1, ["--dropout", "0.1"]),
    "epoch_boundary": (1, ["--per_device_train_batch_size", "5"]),
    "accumulation": (1, ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]),
    "workers": (1, ["--dataloader_num_workers", "2"]),
    "ranks": (2, ["--per_device_train_batch_size", "4", "--dropout", "0.1"]),
    "bf16": (1, ["--mixed_precision", "bf16"]),
}
NUM_KILLS = {"few": 4, "many": 34}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("number", ["few", pytest.param("many", marks=pytest.mark.exhaustive)])
def test_run_when_killed_at_random_instants_then_ends_like_an_uninterrupted_run(
    name: str, number: str, tiny_text: Path, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    num_ranks, options = CONFIGURATIONS[name]
    text = tmp_path / "text.txt"
    text.write_bytes(tiny_text.read_bytes()[: 32 * 23])
    words = [
        *("--train_file", str(text), "--tokenizer_name", str(tiny_gpt2_dir), "--config_name", str(tiny_gpt2_dir)),
        *("--block_size", "32", "--max_train_steps", "60", "--learning_rate", "1e-3", "--seed", "7", "--use_cpu"),
        *("--checkpointing_steps", "3", "--save_minutes", "0.005", "--save_total_limit", "2", "--eval_steps", "10"),
        *("--logging_steps", "4", "--sample_steps", "25", "--dropout", "0", *options),
    ]
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    seconds = run_uninterrupted(words, uninterrupted, num_ranks)
    draw = random.Random(f"{name} {number}")
    tally = run_killed(words, killed, num_ranks, num_kills=NUM_KILLS[number], seconds=seconds, draw=draw)
    print(f"{name}: {tally}; the uninterrupted run took {seconds:.1f} s")
    assert (tally.num_refused, tally.num_damaged, tally.num_lost) == (0, 0, 0), tally.problems
    assert tally.num_kills == NUM_KILLS[number]
    assert tally.num_kills_in_writes >= tally.num_kills // 4
    assert differences(uninterrupted, killed) == []
