"""The main program on token shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm.prepare import main as prepare
from tests.conftest import Outcome


@pytest.fixture
def shards(tmp_path: Path, tiny_text: Path, tiny_gpt2_dir: Path) -> Path:
    folder = tmp_path / "shards"
    words = ["--train_file", str(tiny_text), "--tokenizer_name", str(tiny_gpt2_dir), "--shard_size", "9999"]
    assert prepare([*words, "--output_dir", str(folder)]) == 0
    return folder


def _words(tiny_gpt2_dir: Path) -> list[str]:
    return [
        *("--config_name", str(tiny_gpt2_dir), "--dropout", "0", "--block_size", "32", "--max_train_steps", "3"),
        *("--learning_rate", "1e-3", "--seed", "7", "--use_cpu", "--mixed_precision", "no"),
    ]


def _results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())


def test_train_when_shards_are_given_then_equal_to_a_run_on_the_text(
    train: Callable[..., Outcome], tiny_text: Path, tiny_gpt2_dir: Path, shards: Path, tmp_path: Path
) -> None:
    words = _words(tiny_gpt2_dir)
    one = train("--train_file", tiny_text, "--tokenizer_name", tiny_gpt2_dir, *words, "--output_dir", tmp_path / "a")
    assert one.code == 0, one.err
    for name, more in (("b", []), ("c", ["--tokenizer_name", tiny_gpt2_dir]), ("d", ["--validation_dir", shards])):
        other = train("--train_dir", shards, *more, *words, "--output_dir", tmp_path / name)
        assert other.code == 0, other.err
        for key in ("eval_loss", "bits_per_byte", "ledger"):
            assert _results(tmp_path / name)[key] == _results(tmp_path / "a")[key]


def test_train_when_shards_are_given_as_files_then_the_same_ids(
    train: Callable[..., Outcome], tiny_gpt2_dir: Path, shards: Path, tmp_path: Path
) -> None:
    files = ["--train_file", shards / "train_*.bin", "--validation_file", shards / "validation_*.bin"]
    words = _words(tiny_gpt2_dir)
    assert train(*files, *words, "--output_dir", tmp_path / "a").code == 0
    assert train("--train_dir", shards, *words, "--output_dir", tmp_path / "b").code == 0
    assert _results(tmp_path / "a")["eval_loss"] == _results(tmp_path / "b")["eval_loss"]
    assert _results(tmp_path / "a")["bits_per_byte"] == _results(tmp_path / "b")["bits_per_byte"]


def test_train_when_shards_are_unsuitable_then_one_line(
    train: Callable[..., Outcome], tiny_text: Path, tiny_gpt2_dir: Path, shards: Path, tmp_path: Path
) -> None:
    words = _words(tiny_gpt2_dir)
    other = tmp_path / "other"
    assert prepare(["--train_file", str(tiny_text), "--train_tokenizer", "bpe", "--output_dir", str(other)]) == 0
    np.full(500, 999, np.uint16).tofile(tmp_path / "high.bin")
    np.zeros(500, np.uint16).tofile(tmp_path / "low.bin")
    tokenizer = ["--tokenizer_name", other / "tokenizer"]
    for arguments, code, message in (
        (["--train_dir", shards, *tokenizer], 1, "made with another tokenizer"),
        (["--train_dir", shards, "--validation_dir", other], 1, "made with another tokenizer"),
        (["--train_dir", tmp_path / "shrads"], 1, "nearest name in"),
        (["--train_dir", shards, "--train_file", tiny_text], 2, "give one of them"),
        (["--validation_dir", shards], 2, "give the training tokens as --train_dir"),
        (["--train_file", tmp_path / "high.bin"], 1, "hold id 999"),
        (["--train_file", tmp_path / "low.bin", tiny_text], 1, "mixed; give one kind"),
        (["--train_file", tmp_path / "low.bin", "--tokenizer_name", "char"], 1, "tokens are given, not text"),
    ):
        outcome = train(*arguments, *words)
        assert outcome.code == code, arguments
        assert message in outcome.err
        assert outcome.err.count("error: ") == 1
    (shards / "manifest.json").unlink()
    assert "the shards are unfinished" in train("--train_dir", shards, *words).err
