"""The main program with `--document_mask`."""

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
    """Documents of one letter to three blocks."""
    draw = random.Random(4)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 20)))[: draw.choice((1, 99))] for _ in range(600)]


@pytest.fixture
def rows_file(rows: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def words(rows_file: Path, tiny_options: list[str]) -> list[str]:
    """Fifteen updates on documents, and a checkpoint after every five."""
    at = tiny_options.index("--train_file")
    more = ["--max_train_steps", "15", "--checkpointing_steps", "5", "--per_device_train_batch_size", "4"]
    return [*tiny_options[:at], "--train_file", str(rows_file), *tiny_options[at + 2 :], *more]


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text())


def _apart(folder: Path, rows: list[str], num_validation: int) -> tuple[float, int]:
    """Validation loss and count by a loop over the documents, cut where blocks are cut."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    alphabet = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    documents = [[*(alphabet[char.replace(" ", "Ġ")] for char in row), 256] for row in rows]
    held_out: list[list[int]] = []
    while sum(map(len, held_out)) < num_validation:
        held_out.insert(0, documents.pop())
    assert sum(map(len, held_out)) == num_validation
    last = (num_validation - 1) // BLOCK * BLOCK
    loss, count, place = 0.0, 0, 0
    for document in held_out:
        # The pieces of the document in each block, and of each token the one behind it in the document.
        for cut in range(place // BLOCK * BLOCK, min(place + len(document), last), BLOCK):
            start, stop = max(cut, place) - place, min(cut + BLOCK, place + len(document), last) - place
            targets = document[start + 1 : stop + 1]
            if targets:
                with torch.no_grad():
                    logits = model(torch.tensor([document[start:stop]])).logits[0, : len(targets)]
                loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum"))
            count += len(targets)
        place += len(document)
    return loss / count, count


def test_train_when_documents_are_kept_apart_then_evaluates_as_a_loop_over_them(
    train: Train, words: list[str], rows: list[str], tmp_path: Path
) -> None:
    outcome = train(*words, "--document_mask", "--output_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "; document mask: the first token of a document is read, but never predicted" in outcome.out
    results = _results(tmp_path / "run")
    held_out = results["ledger"]["validation_tokens"] + results["ledger"]["dropped_validation"]
    loss, count = _apart(tmp_path / "run", rows, held_out)
    assert results["num_eval_tokens"] == count < results["ledger"]["validation_tokens"] - 1
    assert results["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_resume_when_documents_are_kept_apart_then_bit_identical_and_never_with_the_other_setting(
    train: Train, words: list[str], tmp_path: Path
) -> None:
    run = [*words, "--dropout", "0.1", "--output_dir", tmp_path / "run"]
    assert train(*run, "--document_mask").code == 0
    whole, losses = load_file(tmp_path / "run" / "model.safetensors"), _results(tmp_path / "run")
    for name in ("checkpoints/step_15", "checkpoints/step_10"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "model.safetensors").unlink()
    refused = train(*run, "--resume_from_checkpoint")
    assert refused.code == 1
    assert "was made with --document_mask True, this run has False" in refused.err
    outcome = train(*run, "--resume_from_checkpoint", "--document_mask", "--dataloader_num_workers", "2")
    assert outcome.code == 0, outcome.err
    assert "resumed from step 5" in outcome.out
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert _results(tmp_path / "run")["eval_loss"] == losses["eval_loss"]


def test_resume_when_the_checkpoint_is_from_before_the_option_then_it_had_no_mask(
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
    assert "was made with --document_mask False, this run has True" in refused.err
    assert train(*run, "--resume_from_checkpoint").code == 0
    assert _results(tmp_path / "run")["eval_loss"] == plain["eval_loss"]


def test_train_when_tokens_are_of_another_program_then_documents_end_with_the_end_of_text(
    train: Train, words: list[str], rows: list[str], rows_file: Path, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    made = ["--train_file", rows_file, "--tokenizer_name", tiny_gpt2_dir, "--shard_size", "999"]
    assert prepare([*map(str, made), "--output_dir", str(shards)]) == 0
    foreign = tmp_path / "nanogpt"
    foreign.mkdir()
    for split, name in (("train", "train.bin"), ("validation", "val.bin")):
        ids = [np.fromfile(path, "<u2") for path in sorted(shards.glob(f"{split}_*.bin"))]
        np.concatenate(ids).tofile(foreign / name)
    at = words.index("--train_file")
    words = [*words[:at], *words[at + 2 :], "--document_mask"]
    for name, folder in (("a", shards), ("b", foreign)):
        outcome = train(*words, "--train_dir", folder, "--output_dir", tmp_path / name)
        assert outcome.code == 0, outcome.err
        said = [line for line in outcome.out.splitlines() if line.startswith("document mask: in ")]
        assert said == ([f"document mask: in {foreign} a document ends with <|endoftext|>"] if name == "b" else [])
    one, other = _results(tmp_path / "a"), _results(tmp_path / "b")
    assert {key: one[key] for key in ("eval_loss", "num_eval_tokens", "train_loss")} == {
        key: other[key] for key in ("eval_loss", "num_eval_tokens", "train_loss")
    }

    silent = tmp_path / "tokenizer"
    shutil.copytree(tiny_gpt2_dir, silent)
    facts = json.loads((silent / "tokenizer_config.json").read_text())
    del facts["eos_token"]
    (silent / "tokenizer_config.json").write_text(json.dumps(facts))
    refused = train(*words, "--train_dir", foreign, "--tokenizer_name", silent)
    assert refused.code == 1
    assert "does not say where documents start, and the tokenizer has no end-of-text token" in refused.err
    assert refused.err.count("error: ") == 1


def test_train_when_the_architecture_cannot_keep_documents_apart_then_refused_in_one_line(
    train: Train, words: list[str], tiny_gpt2_dir: Path
) -> None:
    at = words.index("--config_name")
    words = [*words[:at], *words[at + 2 :], "--model_type", "bloom"]
    words[words.index("--dropout") : words.index("--dropout") + 2] = []
    small = ["--config_overrides", "hidden_size=32,n_layer=1,n_head=2", "--tokenizer_name", tiny_gpt2_dir]
    assert train(*words, *small, "--dry_run", "--document_mask").out.count("tokens: at most 128 an update") == 1
    refused = train(*words, *small, "--document_mask")
    assert refused.code == 1
    assert "--document_mask: bloom with --attn_implementation eager does not keep documents apart" in refused.err
    assert refused.err.count("error: ") == 1
