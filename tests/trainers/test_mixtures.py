"""The main program on several folders of shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm.data.shards.format import open_folder
from llm.prepare import main as prepare
from tests.conftest import Outcome, keep_only

Train = Callable[..., Outcome]


@pytest.fixture
def folders(tiny_text: Path, tiny_gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Folders A and B, here, of about 40,000 and 20,000 tokens."""
    monkeypatch.chdir(tmp_path)
    text = tiny_text.read_text()
    for name, part in (("A", text[:40_000]), ("B", text[40_000:60_000].upper())):
        (tmp_path / f"{name}.txt").write_text(part)
        words = ["--train_file", f"{name}.txt", "--tokenizer_name", str(tiny_gpt2_dir), "--shard_size", "9999"]
        assert prepare([*words, "--output_dir", name]) == 0
    return tmp_path / "A", tmp_path / "B"


@pytest.fixture
def words(tiny_gpt2_dir: Path) -> list[str]:
    return [
        *("--config_name", str(tiny_gpt2_dir), "--dropout", "0", "--block_size", "32", "--max_train_steps", "10"),
        *("--learning_rate", "1e-3", "--seed", "7", "--use_cpu", "--mixed_precision", "no"),
    ]


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text())


def test_train_when_folders_are_mixed_then_shares_are_logged_and_a_resume_is_bit_identical(
    train: Train, folders: tuple[Path, Path], words: list[str], tmp_path: Path
) -> None:
    run = [*words, "--train_dir", "A=0.7", "B=0.3", "--checkpointing_steps", "4", "--output_dir", "run"]
    outcome = train(*run)
    assert outcome.code == 0, outcome.err
    texts = [open_folder(folder) for folder in folders]
    sizes = [len(text.train.tokens) for text in texts]
    blocks = [(size - 1) // 32 for size in sizes]
    for name, share, size, reads in (
        ("A", "70.00%", sizes[0], 56 / blocks[0]),
        ("B", "30.00%", sizes[1], 24 / blocks[1]),
    ):
        assert f"mixture: {name} | {share} | {size:,} tokens | read {reads:.2f} times" in outcome.out.splitlines()
    results = _results(tmp_path / "run")
    held_out = sum(len(text.validation.tokens) for text in texts if text.validation)
    ledger = results["ledger"]
    assert ledger["train_tokens"] + ledger["dropped_train"] == sum(sizes)
    assert ledger["validation_tokens"] + ledger["dropped_validation"] == held_out
    assert results["num_unreached_tokens"] == (sum(blocks) - 80) * 32
    assert results["bits_per_byte"] > 0

    whole = load_file("run/model.safetensors")
    keep_only(Path("run"), 4)
    Path("run/model.safetensors").unlink()
    resumed = train(*run, "--resume_from_checkpoint", "--dataloader_num_workers", "2")
    assert resumed.code == 0, resumed.err
    assert "resumed from step 4" in resumed.out
    weights = load_file("run/model.safetensors")
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    keep_only(Path("run"), 4)
    for other in (["A=0.6", "B=0.4"], ["B=0.3", "A=0.7"], ["A", "B"], ["A"]):
        refused = train(*words, "--train_dir", *other, "--output_dir", "run", "--resume_from_checkpoint")
        assert refused.code == 1
        assert "was made on other text" in refused.err
    assert 'train_dir = ["A=0.7", "B=0.3"]' in Path("run/config.toml").read_text()


def test_train_when_a_single_folder_has_a_weight_then_the_weight_has_no_effect(
    train: Train, folders: tuple[Path, Path], words: list[str], tmp_path: Path
) -> None:
    for folder, name in (("A", "a"), ("A=0.2", "b")):
        assert train(*words, "--train_dir", folder, "--output_dir", name).code == 0
    assert _results(tmp_path / "a")["data_hash"] == _results(tmp_path / "b")["data_hash"]
    assert _results(tmp_path / "a")["train_loss"] == _results(tmp_path / "b")["train_loss"]
    assert _results(tmp_path / "a")["data_hash"] == open_folder(folders[0]).data_hash


def test_train_when_folders_have_no_weights_then_each_is_read_equally_often(
    train: Train, folders: tuple[Path, Path], words: list[str], tmp_path: Path
) -> None:
    words[words.index("--max_train_steps") : words.index("--max_train_steps") + 2] = []
    more = ["--num_train_epochs", "2", "--dry_run", "--document_mask"]
    outcome = train(*words, *more, "--train_dir", "A", "B")
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if line.startswith("mixture: ")]
    assert len(lines) == 2
    assert all(line.endswith("| read 2.00 times") for line in lines)


def test_train_when_a_folder_is_external_or_validation_is_named_then_held_out_tokens_are_concatenated(
    train: Train, folders: tuple[Path, Path], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "C").mkdir()
    ids = open_folder(folders[1]).train.tokens[:]
    np.asarray(ids).astype(np.uint16).tofile(tmp_path / "C" / "train.bin")
    outcome = train(*words, "--train_dir", "A=1", "C=1", "--document_mask", "--output_dir", "one")
    assert outcome.code == 0, outcome.err
    assert "document mask: in C a document ends with <|endoftext|>" in outcome.out
    validation = open_folder(folders[0]).validation
    assert validation is not None
    held_out = len(ids) - int(len(ids) * 0.95)
    ledger = _results(tmp_path / "one")["ledger"]
    assert ledger["validation_tokens"] + ledger["dropped_validation"] == len(validation.tokens) + held_out
    outcome = train(*words, "--train_dir", "A=1", "C=1", "--validation_dir", "B", "--output_dir", "two")
    assert outcome.code == 0, outcome.err
    other = open_folder(folders[1]).validation
    assert other is not None
    ledger = _results(tmp_path / "two")["ledger"]
    assert ledger["validation_tokens"] + ledger["dropped_validation"] == len(other.tokens)
    assert ledger["train_tokens"] + ledger["dropped_train"] == len(open_folder(folders[0]).train.tokens) + len(ids)


def test_train_when_mixed_folders_are_unsuitable_then_one_line(
    train: Train, folders: tuple[Path, Path], words: list[str], tiny_text: Path, tmp_path: Path
) -> None:
    assert prepare(["--train_file", str(tiny_text), "--train_tokenizer", "bpe", "--output_dir", "other"]) == 0
    (tmp_path / "high").mkdir()
    np.full(500, 999, np.uint16).tofile(tmp_path / "high" / "train.bin")
    (tmp_path / "short").mkdir()
    np.zeros(20, np.uint16).tofile(tmp_path / "short" / "train.bin")
    for arguments, code, message in (
        (["A=0.5", "B"], 2, "B: has no weight, but others have"),
        (["A=0", "B=1"], 2, "A=0: a weight must be above 0"),
        (["A=0.5", "A=0.5"], 2, "A: is named twice"),
        (["A=0.5", "Bee=0.5"], 1, "--train_dir Bee: no such folder"),
        (["A=0.5", "B=x"], 2, "B=x: has no weight"),
        (["A=0.5", "other=0.5"], 1, "--train_dir other: not of the tokenizer of A"),
        (["A", "high"], 1, "--train_dir high: not of the tokenizer of A"),
        (["A", "short"], 1, "--train_dir short has 19 tokens, and a block of --block_size 32 needs 33"),
    ):
        outcome = train(*words, "--train_dir", *arguments)
        assert outcome.code == code, (arguments, outcome.err)
        assert message in outcome.err, arguments
        assert outcome.err.count("error: ") == 1
        assert "weights:" not in outcome.out
