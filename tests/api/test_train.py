"""Test `llm.train`: it does what the command line does, with text, model and tokenizer as objects."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel

import llm.training.run
from llm import TrainOptions, TrainResult, UserError, train
from llm.config.errors import UsageError
from llm.training.updaters.synchronous import SynchronousUpdater
from tests.conftest import WORDS, Outcome, keep_only

Common = dict[str, Any]


@pytest.fixture
def documents(tiny_text: Path) -> list[str]:
    """Return forty documents, which end in a newline."""
    lines = tiny_text.read_text().splitlines(keepends=True)
    return ["".join(lines[start : start + 50]) for start in range(0, 2000, 50)]


@pytest.fixture
def common() -> Common:
    """Return the options of `tiny_options` that neither name text, model nor tokenizer."""
    return {
        "block_size": 32,
        "per_device_train_batch_size": 8,
        "max_train_steps": 20,
        "learning_rate": 1e-3,
        "seed": 7,
        "use_cpu": True,
        "mixed_precision": "no",
        "logging_steps": 1,
    }


@pytest.fixture
def scratch(common: Common, tiny_gpt2_dir: Path) -> Common:
    """Return the options of a run from scratch."""
    return common | {"tokenizer_name": tiny_gpt2_dir, "config_name": tiny_gpt2_dir, "dropout": 0}


def losses(folder: Path | None) -> list[float]:
    """Return the training losses and evaluation losses of a run, in order."""
    assert folder is not None
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records for key in ("loss", "eval_loss") if key in record]


def are_equal(model: PreTrainedModel, folder: Path | None) -> bool:
    assert folder is not None
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


# The same run as on the command line


def test_train_when_text_is_a_string_then_equals_the_run_on_the_file(
    train: Callable[..., Outcome], tiny_options: list[str], tiny_text: Path, scratch: Common, tmp_path: Path
) -> None:
    assert train(*tiny_options, "--logging_steps", "1", "--output_dir", tmp_path / "cli").code == 0
    result = llm.train([tiny_text.read_text()], TrainOptions(output_dir=tmp_path / "api", **scratch))
    assert losses(result.output_dir) == losses(tmp_path / "cli")
    weights = load_file(tmp_path / "cli" / "model.safetensors")
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in load_file(tmp_path / "api" / "model.safetensors").items()
    )
    # The commands differ, and what is named; the text does not.
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("cli", "api")]
    assert results[0]["data_hash"] == results[1]["data_hash"]
    assert results[0]["ledger"] == results[1]["ledger"]


def test_train_when_text_is_documents_then_equals_the_run_on_their_rows(scratch: Common, tmp_path: Path) -> None:
    texts = [f"{word} and {other}. " * 9 for word in WORDS for other in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    folders = [
        train(text, TrainOptions(output_dir=tmp_path / name, document_mask=True, **scratch, **more)).output_dir
        for name, text, more in (
            ("file", None, {"train_file": tmp_path / "rows.jsonl"}),
            ("strings", texts, {}),
            ("dataset", datasets.Dataset.from_dict({"text": texts}), {}),
        )
    ]
    assert len(losses(folders[0])) == 21
    assert losses(folders[0]) == losses(folders[1]) == losses(folders[2])


def test_train_when_validation_is_given_then_nothing_is_held_out(
    documents: list[str], scratch: Common, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(documents[1:], TrainOptions(**scratch), validation=documents[:1])
    out = capsys.readouterr().out
    assert "held out for validation" not in out
    assert f"{(len(documents[0]) - 1) // 32 * 32 + 1:,} held out" in out
    assert result.eval_loss is not None


def test_train_when_the_options_name_everything_then_is_the_run_of_the_command_line(
    tiny_text: Path, scratch: Common, tmp_path: Path
) -> None:
    result = train(options=TrainOptions(train_file=tiny_text, output_dir=tmp_path / "run", **scratch))
    assert result.output_dir == tmp_path / "run"
    assert result.tokens == 20 * 8 * 32


# The result


def test_result_when_finished_then_has_losses_and_paths(
    documents: list[str], scratch: Common, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(documents, TrainOptions(output_dir=tmp_path / "run", **scratch))
    stored = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert (result.exit_code, result.stopped, result.step) == (0, False, 20)
    for name in ("train_loss", "eval_loss", "perplexity", "bits_per_byte", "tokens"):
        assert getattr(result, name) == stored[name]
    assert result.best_eval_loss == result.eval_loss
    assert result.model_dir == result.output_dir == tmp_path / "run"
    assert result.metrics_file == tmp_path / "run" / "metrics.jsonl"
    assert result.checkpoints == [tmp_path / "run" / "checkpoints" / "step_20"]
    for folder in (result.model_dir, result.checkpoints[0]):
        AutoModelForCausalLM.from_pretrained(folder)
    out = capsys.readouterr().out
    assert "step 20/20 | loss " in out
    assert "eval step 20 | loss " in out
    card = (tmp_path / "run" / "README.md").read_text()
    assert "```python\ntrain(text, TrainOptions(" in card
    assert "trained from scratch on `40 strings`" in card


def test_result_when_nothing_is_kept_then_has_losses_only(documents: list[str], scratch: Common) -> None:
    result = train(documents, TrainOptions(**scratch))
    assert result.eval_loss is not None
    assert (result.output_dir, result.model_dir, result.metrics_file, result.checkpoints) == (None, None, None, [])


def test_train_when_dry_run_then_nothing_is_trained(
    documents: list[str], common: Common, tiny_gpt2: Any, byte_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = copy.deepcopy(tiny_gpt2.state_dict())
    options = TrainOptions(dry_run=True, kfac=True, **common)
    result = train(documents, options, model=tiny_gpt2, tokenizer=byte_tokenizer)
    assert result == TrainResult(exit_code=0)
    assert f"parameters: {tiny_gpt2.num_parameters():,}" in capsys.readouterr().out
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_gpt2.state_dict().items())


# One process


def test_train_when_called_twice_then_the_second_run_is_the_same_and_the_process_is_as_before(
    documents: list[str], scratch: Common, tmp_path: Path
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    first = train(documents, TrainOptions(output_dir=tmp_path / "one", **scratch))
    with pytest.raises(UserError, match="holds another run"):
        train(documents, TrainOptions(output_dir=tmp_path / "one", **scratch))
    second = train(documents, TrainOptions(output_dir=tmp_path / "two", **scratch))
    assert losses(first.output_dir) == losses(second.output_dir)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


def test_train_when_in_another_thread_then_works(documents: list[str], scratch: Common, tmp_path: Path) -> None:
    results: list[TrainResult] = []
    options = TrainOptions(output_dir=tmp_path / "run", **scratch)
    thread = threading.Thread(target=lambda: results.append(train(documents, options)))
    thread.start()
    thread.join()
    assert results[0].exit_code == 0
    assert results[0].model_dir == tmp_path / "run"


# A model of the caller


@pytest.mark.parametrize("more", [{}, {"optim": "muon"}, {"kfac": True}], ids=str)
def test_model_when_given_then_equals_the_run_on_its_folder_and_holds_the_trained_weights(
    more: Common, documents: list[str], common: Common, tiny_gpt2: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_gpt2.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    named = TrainOptions(output_dir=tmp_path / "named", model_name_or_path=tmp_path / "model", **common, **more)
    options = TrainOptions(output_dir=tmp_path / "given", **common, **more)
    expected = train(documents, named)
    tiny_gpt2.eval()
    modules = {name: type(module) for name, module in tiny_gpt2.named_modules()}
    result = train(documents, options, model=tiny_gpt2, tokenizer=byte_tokenizer)
    assert losses(result.output_dir) == losses(expected.output_dir)
    assert are_equal(tiny_gpt2, result.model_dir)
    assert are_equal(tiny_gpt2, expected.model_dir)
    # Apart from the weights the object is as it was.
    assert not tiny_gpt2.training
    assert modules == {name: type(module) for name, module in tiny_gpt2.named_modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_gpt2.modules())
    assert tiny_gpt2.config._attn_implementation == "sdpa"
    assert tiny_gpt2.lm_head.weight is tiny_gpt2.transformer.wte.weight
    assert "fine-tuned from `a model built in Python`" in (tmp_path / "given" / "README.md").read_text()


def test_model_when_trained_twice_then_the_second_run_starts_with_the_first_ones_weights(
    documents: list[str], common: Common, tiny_gpt2: Any, byte_tokenizer: Any
) -> None:
    results = [train(documents, TrainOptions(**common), model=tiny_gpt2, tokenizer=byte_tokenizer) for _ in range(2)]
    assert results[0].eval_loss is not None
    assert results[1].eval_loss is not None
    assert results[1].eval_loss < results[0].eval_loss - 0.1


def test_model_when_in_bfloat16_and_in_part_frozen_then_stays_so(
    documents: list[str], common: Common, tiny_gpt2: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_gpt2.transformer.wpe.requires_grad_(False)
    before = copy.deepcopy(tiny_gpt2.bfloat16().state_dict())
    options = TrainOptions(output_dir=tmp_path / "run", **common)
    result = train(documents, options, model=tiny_gpt2, tokenizer=byte_tokenizer)
    after = tiny_gpt2.state_dict()
    trained = load_file(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert "transformer.wpe.weight" not in changed
    assert "transformer.wte.weight" in changed
    assert torch.equal(after["transformer.ln_f.bias"], trained["transformer.ln_f.bias"].bfloat16())
    assert result.exit_code == 0


def test_model_when_the_run_is_resumed_then_ends_with_the_same_bits(
    documents: list[str], common: Common, tiny_gpt2: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    other = copy.deepcopy(tiny_gpt2)
    options: Common = {**common, "output_dir": tmp_path / "run", "checkpointing_steps": 8}
    whole = train(documents, TrainOptions(**options), model=tiny_gpt2, tokenizer=byte_tokenizer)
    expected = losses(whole.output_dir)
    keep_only(tmp_path / "run", 8)
    # The weights of the checkpoint count, not those of the object.
    torch.nn.init.zeros_(other.transformer.wte.weight)
    resumed = TrainOptions(**options, resume_from_checkpoint=True)
    result = train(iter(documents), resumed, model=other, tokenizer=byte_tokenizer)
    assert result.step == 20
    assert losses(result.output_dir)[-13:] == expected[-13:]
    assert are_equal(other, result.model_dir)
    assert all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), tiny_gpt2.state_dict().values(), strict=True)
    )


def test_model_when_the_text_of_a_resumed_run_is_another_then_is_refused_and_the_model_unchanged(
    documents: list[str], common: Common, tiny_gpt2: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    options = TrainOptions(output_dir=tmp_path / "run", resume_from_checkpoint=True, **common)
    train(documents, options, model=tiny_gpt2, tokenizer=byte_tokenizer)
    before = copy.deepcopy(tiny_gpt2.state_dict())
    with pytest.raises(UserError, match="was made on other text"):
        train(documents[1:], options, model=tiny_gpt2, tokenizer=byte_tokenizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_gpt2.state_dict().items())


def test_model_when_the_run_is_stopped_then_holds_the_weights_of_the_last_update(
    documents: list[str], common: Common, tiny_gpt2: Any, byte_tokenizer: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    update = SynchronousUpdater.update

    def interrupted(self: SynchronousUpdater, *arguments: Any, **keywords: Any) -> Any:
        if arguments[1] == 4:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C
        return update(self, *arguments, **keywords)

    monkeypatch.setattr(SynchronousUpdater, "update", interrupted)
    options = TrainOptions(output_dir=tmp_path / "run", **common)
    result = train(documents, options, model=tiny_gpt2, tokenizer=byte_tokenizer)
    assert result.stopped
    assert result.exit_code == 75
    assert 0 < result.step < 20
    assert result.model_dir == tmp_path / "run" / "checkpoints" / f"step_{result.step}"
    assert are_equal(tiny_gpt2, result.model_dir)


TWO_RANKS = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from llm import TrainOptions, train

torch.manual_seed(0)
folder, out, rank = sys.argv[1], Path(sys.argv[2]), int(__import__("os").environ["RANK"])
model = AutoModelForCausalLM.from_pretrained(folder)
documents = [f"the king number {k} speaks of love and night. " * 4 for k in range(300)]
options = TrainOptions(output_dir=out / "run", block_size=32, max_train_steps=4, per_device_train_batch_size=4, seed=7,
                       use_cpu=True, dropout=0, mixed_precision="no", learning_rate=1e-3)
result = train(documents, options, model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
assert result.step == 4 and result.exit_code == 0
torch.save(model.state_dict(), out / f"rank{rank}.pt")
"""


@pytest.mark.slow
def test_train_when_on_two_ranks_then_every_rank_holds_the_trained_weights(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "script.py"), str(tiny_gpt2_dir), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    weights = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    trained = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in trained.items())


# Mistakes


def mistake(*arguments: Any, **keywords: Any) -> str:
    with pytest.raises(UsageError) as caught:
        train(*arguments, **keywords)
    return str(caught.value)


def test_train_when_text_is_given_twice_then_is_refused() -> None:
    text = mistake(["a"], TrainOptions(train_file="a.txt", validation_file="b.txt"))
    assert text.splitlines() == [
        "text is given, and so is train_file; give one of them",
        "text is given, and so is validation_file; give one of them",
    ]


def test_train_when_model_and_tokenizer_are_named_too_then_is_refused(tiny_gpt2: Any, byte_tokenizer: Any) -> None:
    options = TrainOptions(model_name_or_path="gpt2", tokenizer_name="gpt2")
    assert mistake(["a"], options, model=tiny_gpt2, tokenizer=byte_tokenizer).splitlines() == [
        "model is given, and so is model_name_or_path; give one of them",
        "tokenizer is given, and so is tokenizer_name; give one of them",
    ]


def test_train_when_an_argument_has_a_wrong_type_then_is_refused(tiny_gpt2: Any) -> None:
    assert mistake("my.txt").startswith("text: is a str; give a list of strings")
    assert mistake(["a"], {"seed": 1}) == "options: is a dict; give TrainOptions(...)"
    assert mistake(["a"], tokenizer="gpt2") == "tokenizer: is a str; give a tokenizer of transformers"
    assert mistake(["a"], TrainOptions(tokenizer_name="char"), model=torch.nn.Linear(2, 2)).startswith(
        "model: is a Linear"
    )
    assert mistake(["a"], model=tiny_gpt2).startswith("model: its tokenizer is not known; give tokenizer=...")
    assert mistake(validation=["a"]).startswith("validation is given without text")


def test_train_when_streaming_then_the_tokenizer_must_be_named(byte_tokenizer: Any) -> None:
    options = TrainOptions(streaming=True, max_train_steps=2)
    assert mistake(options=options, tokenizer=byte_tokenizer).startswith("tokenizer: with streaming")


def test_train_when_the_text_is_too_short_or_empty_then_is_refused(scratch: Common) -> None:
    with pytest.raises(UserError, match="text: holds no text"):
        train(["", ""], TrainOptions(**scratch))
    with pytest.raises(UserError, match="a block of --block_size 32 needs 33"):
        train(["short"], TrainOptions(**scratch))


def test_train_when_the_dataset_has_no_text_column_then_its_columns_are_listed(scratch: Common) -> None:
    with pytest.raises(UserError, match="no column 'text'; its columns are body"):
        train(datasets.Dataset.from_dict({"body": ["a"]}), TrainOptions(**scratch))


def test_model_when_of_another_vocabulary_then_is_refused(
    documents: list[str], common: Common, tiny_gpt2: GPT2LMHeadModel, byte_tokenizer: Any
) -> None:
    tiny_gpt2.resize_token_embeddings(200)
    with pytest.raises(UserError, match="the given model has 200 tokens, the tokenizer has 257"):
        train(documents, TrainOptions(**common), model=tiny_gpt2, tokenizer=byte_tokenizer)


def test_model_when_the_block_is_longer_than_its_context_then_is_refused(
    documents: list[str], common: Common, tiny_gpt2: Any, byte_tokenizer: Any
) -> None:
    with pytest.raises(UserError, match="--block_size 65"):
        train(documents, TrainOptions(**common | {"block_size": 65}), model=tiny_gpt2, tokenizer=byte_tokenizer)
