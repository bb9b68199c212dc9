"""Tests of the main program with `--document_mask`."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm.prepare import main as prepare
from llm.training.plan import Plan
from tests.conftest import WORDS, Outcome

Train = Callable[..., Outcome]
BLOCK = 32


@pytest.fixture(scope="module")
def rows() -> list[str]:
    """Documents between one letter and three blocks long."""
    draw = random.Random(4)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 20)))[: draw.choice((1, 99))] for _ in range(600)]


@pytest.fixture
def rows_file(rows: list[str], tmp_path: Path) -> Path:
    """JSON lines with one document each."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def words(rows_file: Path, tiny_options: list[str]) -> list[str]:
    """Options of a run of 15 steps on the documents, with a checkpoint every 5 steps."""
    changes = ["--max_train_steps", "15", "--checkpointing_steps", "5", "--per_device_train_batch_size", "4"]
    return [*_without(tiny_options, "--train_file"), "--train_file", str(rows_file), *changes]


def _without(words: list[str], *names: str) -> list[str]:
    """Return the words without every occurrence of these options and their values."""
    pairs = zip(["", *words[:-1]], words, strict=True)
    return [word for before, word in pairs if word not in names and before not in names]


def _results(folder: Path) -> dict[str, Any]:
    """Return the content of a run's all_results.json."""
    return json.loads((folder / "all_results.json").read_text())


def _loss_document_by_document(folder: Path, rows: list[str], num_validation: int) -> tuple[float, int]:
    """Return the mean validation loss and the number of targets, from one forward per document and block.

    Args:
        folder: the exported model.
        rows: all documents; the last ones are held out.
        num_validation: held-out tokens.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    alphabet = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    documents = [[*(alphabet[char.replace(" ", "Ġ")] for char in row), 256] for row in rows]
    held_out: list[list[int]] = []
    while sum(map(len, held_out)) < num_validation:
        held_out.insert(0, documents.pop())
    assert sum(map(len, held_out)) == num_validation
    end_of_blocks = (num_validation - 1) // BLOCK * BLOCK
    loss = 0.0
    count = 0
    position = 0  # of the document's first token in the stream of held-out tokens
    for document in held_out:
        # The document's tokens in each block are the inputs, and the token after each of them its target.
        document_end = position + len(document)
        for block_start in range(position // BLOCK * BLOCK, min(document_end, end_of_blocks), BLOCK):
            start = max(block_start, position) - position
            stop = min(block_start + BLOCK, document_end, end_of_blocks) - position
            targets = document[start + 1 : stop + 1]
            if targets:
                with torch.no_grad():
                    logits = model(torch.tensor([document[start:stop]])).logits[0, : len(targets)]
                loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum"))
            count += len(targets)
        position += len(document)
    return loss / count, count


def test_train_when_documents_are_masked_then_the_loss_is_that_of_a_loop_over_documents(
    train: Train, words: list[str], rows: list[str], tmp_path: Path
) -> None:
    outcome = train(*words, "--document_mask", "--output_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "document mask: " in outcome.out
    results = _results(tmp_path / "run")
    held_out = results["ledger"]["validation_tokens"] + results["ledger"]["dropped_validation"]
    loss, count = _loss_document_by_document(tmp_path / "run", rows, held_out)
    assert results["num_eval_tokens"] == count < results["ledger"]["validation_tokens"] - 1
    assert results["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_resume_when_documents_are_masked_then_ends_bit_identical_and_is_refused_without_the_mask(
    train: Train, words: list[str], tmp_path: Path
) -> None:
    run = [*words, "--dropout", "0.1", "--output_dir", tmp_path / "run"]
    assert train(*run, "--document_mask").code == 0
    expected, results = load_file(tmp_path / "run" / "model.safetensors"), _results(tmp_path / "run")
    for name in ("checkpoints/step_15", "checkpoints/step_10"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "model.safetensors").unlink()
    refused = train(*run, "--resume_from_checkpoint")
    assert refused.code == 1
    assert "--document_mask True" in refused.err
    outcome = train(*run, "--resume_from_checkpoint", "--document_mask", "--dataloader_num_workers", "2")
    assert outcome.code == 0, outcome.err
    assert "resumed from step 5" in outcome.out
    resumed = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert _results(tmp_path / "run")["eval_loss"] == results["eval_loss"]


def test_resume_when_the_checkpoint_is_older_than_the_option_then_it_counts_as_made_without_a_mask(
    train: Train, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*words, "--output_dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        fields = {field.name for field in dataclasses.fields(Plan)} - {"document_mask", "num_unread"}
        patch.setattr(
            "llm.training.callbacks.checkpointing.asdict", lambda plan: {name: getattr(plan, name) for name in fields}
        )
        assert train(*run).code == 0
    plain = _results(tmp_path / "run")
    assert plain["num_eval_tokens"] == plain["ledger"]["validation_tokens"] - 1
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_15")
    refused = train(*run, "--resume_from_checkpoint", "--document_mask")
    assert "--document_mask False" in refused.err
    assert train(*run, "--resume_from_checkpoint").code == 0
    assert _results(tmp_path / "run")["eval_loss"] == plain["eval_loss"]


def test_train_when_another_program_wrote_the_tokens_then_documents_end_with_the_end_of_text_token(
    train: Train, words: list[str], rows: list[str], rows_file: Path, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    prepare_words = ["--train_file", rows_file, "--tokenizer_name", tiny_gpt2_dir, "--shard_size", "999"]
    assert prepare([*map(str, prepare_words), "--output_dir", str(shards)]) == 0
    external = tmp_path / "nanogpt"
    external.mkdir()
    for split, name in (("train", "train.bin"), ("validation", "val.bin")):
        ids = [np.fromfile(path, "<u2") for path in sorted(shards.glob(f"{split}_*.bin"))]
        np.concatenate(ids).tofile(external / name)
    words = [*_without(words, "--train_file"), "--document_mask"]
    external_line = f"document mask: in {external} a document ends with <|endoftext|>"
    for name, folder, expected in (("a", shards, []), ("b", external, [external_line])):
        outcome = train(*words, "--train_dir", folder, "--output_dir", tmp_path / name)
        assert outcome.code == 0, outcome.err
        assert [line for line in outcome.out.splitlines() if line.startswith("document mask: in ")] == expected
    one, other = _results(tmp_path / "a"), _results(tmp_path / "b")
    for key in ("eval_loss", "num_eval_tokens", "train_loss"):
        assert one[key] == other[key]

    tokenizer_dir = tmp_path / "tokenizer"
    shutil.copytree(tiny_gpt2_dir, tokenizer_dir)
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tokenizer_dir / "tokenizer_config.json").write_text(json.dumps(config))
    refused = train(*words, "--train_dir", external, "--tokenizer_name", tokenizer_dir)
    assert refused.code == 1
    assert "does not say where documents start, and the tokenizer has no end-of-text token" in refused.err
    assert refused.err.count("error: ") == 1


def test_train_when_the_architecture_cannot_mask_documents_then_is_refused_in_one_line(
    train: Train, words: list[str], tiny_gpt2_dir: Path
) -> None:
    words = [*_without(words, "--config_name", "--dropout"), "--model_type", "bloom"]
    small = ["--config_overrides", "hidden_size=32,n_layer=1,n_head=2", "--tokenizer_name", tiny_gpt2_dir]
    assert train(*words, *small, "--dry_run", "--document_mask").out.count("tokens: at most 128 an update") == 1
    refused = train(*words, *small, "--document_mask")
    assert refused.code == 1
    assert "--document_mask: bloom with --attn_implementation eager does not keep documents apart" in refused.err
    assert refused.err.count("error: ") == 1
