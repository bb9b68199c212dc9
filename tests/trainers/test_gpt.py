"""Tests of the main program as a user runs it: from the command line to the files in the run's folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import FOREVER, Outcome, keep_only, train_for_module

Train = Callable[..., Outcome]


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder's model.safetensors by name."""
    return load_file(folder / "model.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest absolute difference of two models' weights, over all elements of all tensors."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def torchrun(*words: str | Path, num_ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run the trainer with torchrun on several ranks of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(num_ranks), "-m", "llm.trainers.gpt", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


FILES_OF_A_RUN = """config.toml status.json metrics.jsonl log.txt tensorboard checkpoints model.safetensors config.json
generation_config.json tokenizer.json tokenizer_config.json README.md all_results.json curves.png"""


@pytest.fixture(scope="module")
def complete_run(tiny_command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Folder and outcome of one complete run with evaluations, samples and checkpoints; tests only read it."""
    folder = tmp_path_factory.mktemp("complete") / "run"
    outcome = train_for_module(
        *tiny_command, "--output_dir", folder, "--checkpointing_steps", "10", "--eval_steps", "10",
        "--sample_steps", "10", "--sample_prompt", "the king", "--logging_steps", "1",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return folder, outcome


def test_run_when_complete_then_its_folder_holds_every_file(complete_run: tuple[Path, Outcome]) -> None:
    folder, outcome = complete_run
    names = {path.name for path in folder.iterdir()}
    assert names >= set(FILES_OF_A_RUN.split())
    assert not [name for name in names if name.endswith((".tmp", ".lock", ".probe"))]
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    lines = outcome.out.splitlines()
    assert any(line.startswith("step 20/20 | loss ") and line.endswith(" | eta 0:00:00") for line in lines)
    assert any(line.startswith("eval step 10 | loss ") and "bits/byte" in line for line in lines)
    assert "saved step 10" in lines
    assert "saved step 20" in lines
    assert "weights: random" in outcome.out
    assert "the king" in outcome.out
    assert (folder / "log.txt").read_text().count("saved step") == 2


def test_run_when_complete_then_the_loss_fell_and_the_model_loads(complete_run: tuple[Path, Outcome]) -> None:
    folder, _ = complete_run
    losses = [record["loss"] for record in records(folder) if "loss" in record]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 257
    ids = tokenizer("the king speaks", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()


def test_results_when_complete_then_agree_with_the_exported_model(
    complete_run: tuple[Path, Outcome], tiny_text: Path
) -> None:
    folder, _ = complete_run
    results = json.loads((folder / "all_results.json").read_text())
    # The held-out 5 % of a single text are its last bytes. The byte tokenizer makes one token of each byte,
    # and the end of the text adds one.
    text = tiny_text.read_bytes()
    held_out = text[int(len(text) * 0.95) :]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer(held_out.decode())["input_ids"], tokenizer.eos_token_id]
    num_blocks = (len(ids) - 1) // 32
    blocks = torch.tensor([ids[i * 32 : i * 32 + 33] for i in range(num_blocks)])
    with torch.no_grad():
        logits = model(blocks[:, :-1]).logits
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), reduction="sum")
    num_eos = int((blocks[:, 1:] == tokenizer.eos_token_id).sum())
    num_targets = num_blocks * 32
    assert results["num_eval_tokens"] == num_targets
    assert results["eval_loss"] == pytest.approx(float(nats) / num_targets, rel=1e-5)
    bits = float(nats) / torch.log(torch.tensor(2.0)).item()
    assert results["bits_per_byte"] == pytest.approx(bits / (num_targets - num_eos), rel=1e-5)
    assert results["tokens"] == 20 * 8 * 32


def test_ledger_when_complete_then_every_token_is_accounted_for(
    complete_run: tuple[Path, Outcome], tiny_text: Path
) -> None:
    results = json.loads((complete_run[0] / "all_results.json").read_text())
    ledger = results["ledger"]
    assert sum(ledger.values()) == tiny_text.stat().st_size + 1  # one token per byte, and the end of the text
    assert ledger["dropped_train"] < 32
    assert ledger["dropped_validation"] < 32
    assert results["num_unreached_tokens"] == ledger["train_tokens"] - 1 - 20 * 8 * 32


@pytest.mark.parametrize("epsilon", ["1e-6", "1e-8"])
def test_weights_when_the_micro_batch_is_smaller_then_are_the_same(
    train: Train, tiny_options: list[str], tmp_path: Path, epsilon: str
) -> None:
    options = [*tiny_options, "--global_batch_size", "8", "--adam_epsilon", epsilon]
    for size in (8, 4, 2):
        outcome = train(*options, "--per_device_train_batch_size", str(size), "--output_dir", tmp_path / str(size))
        assert outcome.code == 0, outcome.err
    bound = 1e-6 if epsilon == "1e-6" else 1e-5
    for size in (4, 2):
        assert largest_difference(weights(tmp_path / "8"), weights(tmp_path / str(size))) <= bound


def test_two_ranks_when_started_by_torchrun_then_end_like_one(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    options = [*tiny_options, "--adam_epsilon", "1e-6", "--lr_scheduler_type", "cosine", "--num_warmup_steps", "3",
               "--logging_steps", "1", "--eval_steps", "10"]  # fmt: skip
    assert train(*options, "--output_dir", tmp_path / "one").code == 0
    for size in ("4", "2"):
        folder = tmp_path / f"two_{size}"
        words = [*options, "--per_device_train_batch_size", size, "--global_batch_size", "8", "--output_dir", folder]
        outcome = torchrun(*words)
        assert outcome.returncode == 0, outcome.stderr
        assert "2 processes" in outcome.stdout
        assert outcome.stdout.count("weights: random") == 1
        assert largest_difference(weights(tmp_path / "one"), weights(folder)) <= 1e-6
        for one, two in zip(records(tmp_path / "one"), records(folder), strict=True):
            for key in one.keys() & {"step", "lr", "tokens", "num_skipped"}:
                assert one[key] == two[key]
            for key in one.keys() & {"loss", "eval_loss", "bits_per_byte", "grad_norm"}:
                assert one[key] == pytest.approx(two[key], rel=1e-4)


def test_learning_rate_when_gradients_are_accumulated_then_depends_only_on_the_step(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4",
             "--num_warmup_steps", "4", "--logging_steps", "1", "--output_dir", tmp_path / "run"]  # fmt: skip
    assert train(*words).code == 0
    rates = [record["lr"] for record in records(tmp_path / "run") if "lr" in record]
    expected = [1e-3 * (k / 4 if k < 4 else (20 - k) / 16) for k in range(20)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_resume_when_killed_in_the_middle_then_ends_bit_identical(
    train: Train, tiny_options: list[str], tmp_path: Path, optim: str
) -> None:
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    options = [*tiny_options, "--optim", optim, "--dropout", "0.1", "--checkpointing_steps", "7", "--eval_steps", "5"]
    assert train(*options, "--output_dir", uninterrupted).code == 0
    # A kill after step 7 leaves neither later checkpoints nor the finished model.
    shutil.copytree(uninterrupted, killed)
    assert len(list((killed / "checkpoints").iterdir())) == 3  # 7, 14, and the last one, which is the best too
    keep_only(killed, 7)
    for name in ("model.safetensors", "all_results.json"):
        (killed / name).unlink()
    outcome = train(*options, "--output_dir", killed, "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert "resumed from step 7" in outcome.out
    assert largest_difference(weights(uninterrupted), weights(killed)) == 0.0
    untimed = [
        [{k: v for k, v in record.items() if "second" not in k and k != "data_wait"} for record in records(folder)]
        for folder in (uninterrupted, killed)
    ]
    assert untimed[0] == untimed[1]


def test_resume_when_the_newest_checkpoint_is_damaged_then_takes_the_one_before(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    options = [*tiny_options, "--checkpointing_steps", "8", "--output_dir", tmp_path / "run"]
    assert train(*options).code == 0
    damaged = tmp_path / "run" / "checkpoints" / "step_20" / "optimizer.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    refused = train(*options, "--resume_from_checkpoint", damaged.parent)
    assert refused.code == 1
    assert "optimizer.safetensors has other content" in refused.err
    outcome = train(*options, "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert "step_20 is damaged" in outcome.err
    assert "resumed from step 16" in outcome.out


def test_resume_when_there_is_no_checkpoint_then_a_bare_flag_starts_from_scratch_and_a_value_is_refused(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    folder = ("--output_dir", tmp_path / "run")
    for value in ("latest", "best", tmp_path / "none"):
        outcome = train(*tiny_options, *folder, "--resume_from_checkpoint", value)
        assert outcome.code == 1
        assert outcome.err.count("\n") == 1
    outcome = train(*tiny_options, *folder, "--resume_from_checkpoint")
    assert outcome.code == 0
    assert "no checkpoint yet, a fresh run" in outcome.out


def test_signal_when_training_then_saves_and_exits_75(tiny_options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*tiny_options, *FOREVER, "--logging_steps", "1", "--output_dir", str(folder)]
    process = subprocess.Popen([sys.executable, "-m", "llm.trainers.gpt", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 75
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["reason"], status["exit_code"]) == ("stopped", "SIGTERM", 75)
    assert f"saved step {status['step']}" in rest
    assert (folder / "checkpoints" / f"step_{status['step']}" / "manifest.json").exists()


def test_output_dir_when_it_holds_a_run_then_is_refused_unless_overwrite_is_given(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = [*tiny_options, "--max_train_steps", "2", "--output_dir", str(folder)]
    assert train(*options).code == 0
    (folder / "notes.txt").write_text("mine")
    refused = train(*options)
    assert refused.code == 1
    assert "holds another run" in refused.err
    assert train(*options, "--overwrite_output_dir").code == 0
    assert (folder / "notes.txt").read_text() == "mine"


def test_training_when_no_output_dir_is_given_then_writes_no_file(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = train(*tiny_options, "--checkpointing_steps", "5")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[0].startswith("output: none, nothing is kept")
    assert list(tmp_path.iterdir()) == []


def test_dry_run_when_requested_then_prints_its_estimates_and_writes_nothing(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    outcome = train(*tiny_options, "--output_dir", tmp_path / "run", "--dry_run")
    assert outcome.code == 0
    for word in ("tokens:", "updates: 20 of 8 blocks of 32", "parameters:", "memory", "disk", "learning rate: 0.001"):
        assert word in outcome.out
    assert "and adamw" in outcome.out
    assert "Muon" not in outcome.out
    assert "step 1" not in outcome.out
    assert not (tmp_path / "run").exists()


def test_dry_run_when_muon_then_prints_both_learning_rates_and_counts_its_state(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    outcome = train(*tiny_options, "--optim", "muon", "--dry_run")
    assert outcome.code == 0, outcome.err
    assert "learning rate: 0.001 at the first update" in outcome.out
    assert "learning rate of Muon: 0.02 at the first update" in outcome.out
    assert "gradients and muon" in outcome.out


@pytest.mark.parametrize(
    ("saved", "requested", "saved_class"), [("adamw", "muon", "AdamW"), ("muon", "adamw", "MuonWithAdamW")]
)
def test_resume_when_the_optimizer_is_another_then_is_refused_in_one_line(
    train: Train, tiny_options: list[str], tmp_path: Path, saved: str, requested: str, saved_class: str
) -> None:
    words = [*tiny_options, "--max_train_steps", "2", "--checkpointing_steps", "1", "--output_dir", tmp_path / "run"]
    assert train(*words, "--optim", saved).code == 0
    refused = train(*words, "--optim", requested, "--resume_from_checkpoint", tmp_path / "run/checkpoints/step_1")
    assert refused.code == 1
    assert "--optim or --kfac" in refused.err
    assert f"(it was {saved_class})" in refused.err
    assert refused.err.count("\n") == 1


def test_model_name_when_low_cpu_mem_usage_is_given_then_weights_are_loaded_bit_identical(
    train: Train, tiny_options: list[str], tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    at = tiny_options.index("--config_name")
    options = tiny_options[:at] + tiny_options[at + 2 :]
    words = [*options, "--model_name_or_path", tiny_gpt2_dir, "--low_cpu_mem_usage", "--learning_rate", "0",
             "--output_dir", tmp_path / "run"]  # fmt: skip
    outcome = train(*words)
    assert outcome.code == 0, outcome.err
    assert f"weights: loaded from {tiny_gpt2_dir}" in outcome.out
    assert largest_difference(weights(tmp_path / "run"), weights(tiny_gpt2_dir)) == 0.0


def test_weight_decay_when_compared_with_none_then_changes_only_matrices(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--max_train_steps", "1", "--weight_decay", "0.5", "--lr_scheduler_type", "constant"]
    assert train(*words, "--output_dir", tmp_path / "decayed").code == 0
    words[words.index("0.5")] = "0"
    assert train(*words, "--output_dir", tmp_path / "plain").code == 0
    decayed, plain = weights(tmp_path / "decayed"), weights(tmp_path / "plain")
    changed = {name for name in plain if not torch.equal(decayed[name], plain[name])}
    assert changed == {name for name in plain if plain[name].ndim >= 2}


def test_update_when_the_loss_is_not_finite_then_is_skipped_and_counted(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm.models.language_model import LanguageModel

    forward, calls = LanguageModel.forward, []

    def poisoned(self: LanguageModel, *inputs: torch.Tensor | None) -> Any:
        loss, count = forward(self, *inputs)
        calls.append(self.training)
        return (loss * float("nan") if sum(calls) == 5 and self.training else loss), count

    monkeypatch.setattr(LanguageModel, "forward", poisoned)
    outcome = train(*tiny_options, "--logging_steps", "1", "--output_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    counts = [record["num_skipped"] for record in records(tmp_path / "run") if "num_skipped" in record]
    assert counts == [0] * 4 + [1] * 16
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run").values())


def test_help_and_usage_errors_when_printed_then_take_under_half_a_second_and_import_no_torch() -> None:
    for words, code in ((["--help"], 0), (["--version"], 0), (["--lerning_rate", "1"], 2)):
        probe = (
            "import sys, time; from llm.trainers.gpt import main\n"
            f"try:\n code = main({words!r})\nexcept SystemExit as stop:\n code = stop.code or 0\n"
            "assert 'torch' not in sys.modules\n"
            "print('CPU', time.process_time(), file=sys.stderr)\n"
            "sys.exit(code)"
        )
        result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
        assert result.returncode == code, result.stderr
        cpu = float(result.stderr.split("CPU ")[1])
        assert cpu < 0.5


def test_second_run_in_one_folder_when_the_first_is_running_then_is_refused(
    tiny_options: list[str], train: Train, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [*tiny_options, *FOREVER, "--logging_steps", "1", "--output_dir", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "llm.trainers.gpt", *words], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        outcome = train(*words, "--resume_from_checkpoint")
        assert outcome.code == 1
        assert f"process {process.pid}" in outcome.err
    finally:
        process.kill()
        process.wait()
    # A killed run leaves its lock file, which no living process holds.
    words[words.index("1000000")] = "4"
    assert train(*words, "--overwrite_output_dir").code == 0


def test_resume_when_the_vocabulary_was_resized_then_loads_the_model_of_the_checkpoint(
    train: Train, tiny_text: Path, byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    from transformers import GPT2Config, GPT2LMHeadModel

    padded = GPT2LMHeadModel(GPT2Config(vocab_size=264, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    padded.save_pretrained(tmp_path / "padded")
    byte_tokenizer.save_pretrained(tmp_path / "padded")
    words = ["--model_name_or_path", tmp_path / "padded", "--train_file", tiny_text, "--block_size", "32", "--use_cpu"]
    words += ["--seed", "1", "--checkpointing_steps", "2", "--output_dir", tmp_path / "run", "--max_train_steps"]
    outcome = train(*words, "4")
    assert outcome.code == 0, outcome.err
    assert weights(tmp_path / "run")["transformer.wte.weight"].shape == (257, 16)
    outcome = train(*words, "6", "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert "resumed from step 4" in outcome.out


def test_checkpoints_when_resumed_from_an_older_one_then_later_ones_move_to_abandoned(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    words = [*tiny_options, "--checkpointing_steps", "5", "--save_total_limit", "2", "--output_dir", tmp_path / "run"]
    assert train(*words).code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["step_15", "step_20"]
    words[words.index("20")] = "18"
    outcome = train(*words, "--resume_from_checkpoint", folder / "step_15")
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in folder.iterdir()) == ["abandoned", "step_15", "step_18"]
    assert [path.name for path in (folder / "abandoned").iterdir()] == ["step_20"]


@pytest.mark.parametrize(
    "words",
    [
        ("--mixed_precision", "bf16"),
        ("--gradient_checkpointing", "--gradient_accumulation_steps", "2"),
        ("--dataloader_num_workers", "2"),
        ("--optim", "sgd", "--max_grad_norm", "0"),
        ("--optim", "muon", "--weight_decay", "0.1"),
    ],
    ids=lambda words: words[0],
)
def test_run_when_trained_with_other_options_then_the_loss_falls_too(
    train: Train, tiny_options: list[str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    rate = ("--learning_rate", "0.1") if "sgd" in words else ()
    outcome = train(*tiny_options, *words, *rate, "--logging_steps", "1", "--output_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    losses = [record["loss"] for record in records(tmp_path / "run") if "loss" in record]
    assert losses[-1] < losses[0] - 0.3


def test_gradient_when_accelerates_launcher_accumulates_too_then_is_not_divided_twice(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny_options, "--max_train_steps", "1", "--output_dir"]
    assert train(*words, tmp_path / "plain").code == 0
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert train(*words, tmp_path / "launched").code == 0
    norms = [records(tmp_path / name)[0]["grad_norm"] for name in ("plain", "launched")]
    assert norms[0] == norms[1]


def test_console_when_its_encoding_lacks_a_character_then_the_run_continues(
    train: Train, tiny_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny_options, "--max_train_steps", "2", "--sample_steps", "1", "--sample_prompt", "a \u2013 b"]
    output = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(output, encoding="latin-1"))
    outcome = train(*words)
    assert outcome.code == 0, outcome.err
    sys.stdout.flush()
    assert b"a \\u2013 b" in output.getvalue()


def test_export_when_its_verification_fails_then_the_weights_are_kept_in_unverified(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llm.training.export

    monkeypatch.setattr(llm.training.export, "probe_loss", lambda *_: 99.0)  # of the reloaded model
    outcome = train(*tiny_options, "--max_train_steps", "2", "--output_dir", tmp_path / "run")
    assert outcome.code == 1
    assert "not verified" in outcome.err
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "run" / "unverified" / "model.safetensors").exists()


def test_secrets_when_a_tracker_reads_the_command_line_then_are_masked(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    assert train(*tiny_options, "--max_train_steps", "1", "--hub_token", "hf_secret").code == 0
    assert "hf_secret" not in " ".join(sys.argv)
    assert "***" in sys.argv


def test_folder_when_a_later_command_fails_then_the_files_of_the_earlier_run_are_unchanged(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert train(*tiny_options, "--checkpointing_steps", "10", "--output_dir", folder).code == 0
    before = {name: (folder / name).read_bytes() for name in ("config.toml", "status.json", "model.safetensors")}
    wrong = [*tiny_options, "--seed", "8", "--output_dir", folder, "--resume_from_checkpoint"]
    assert "--seed 7" in train(*wrong).err
    missing = [*tiny_options, "--train_file", tmp_path / "none.txt", "--output_dir", folder, "--overwrite_output_dir"]
    assert train(*missing).code == 1
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_best_checkpoint_when_save_total_limit_is_reached_then_is_kept_beside_the_newest(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--max_grad_norm", "0", "--lr_scheduler_type", "constant", "--save_total_limit", "1"]
    words += ["--learning_rate", "0.3", "--checkpointing_steps", "4", "--eval_steps", "4", "--output_dir", tmp_path]
    assert train(*words).code == 0
    losses = {record["step"]: record["eval_loss"] for record in records(tmp_path) if "eval_loss" in record}
    best = min(losses, key=lambda step: losses[step])
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"step_{best}", "step_20"}


def test_disk_when_it_is_full_then_one_line_and_the_older_checkpoint_stays(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llm.training.checkpoints.store

    write = llm.training.checkpoints.store.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step_20" in str(path):
            raise OSError(28, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(llm.training.checkpoints.store, "save_file", full)
    outcome = train(*tiny_options, "--checkpointing_steps", "10", "--output_dir", tmp_path / "run")
    assert outcome.code == 1
    assert "No space left on device" in outcome.err
    assert "Traceback" not in outcome.err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_10"]


@pytest.mark.parametrize("heartbeat_seconds", [0.05, 60.0])
def test_folder_when_another_run_has_taken_its_lock_then_the_run_ends_and_writes_nothing_more(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heartbeat_seconds: float
) -> None:
    import llm.training.callbacks.checkpointing

    run, save = tmp_path / "run", llm.training.callbacks.checkpointing.save_checkpoint

    def save_and_lose_the_lock(folder: Path, step: int, **state: Any) -> Path:
        checkpoint = save(folder, step, **state)
        (run / "run.lock").write_text('{"host": "another-host", "pid": 7}')
        (run / "status.json").write_text("status of the other run")
        return checkpoint

    monkeypatch.setattr("llm.files.lock._HEARTBEAT_SECONDS", heartbeat_seconds)
    monkeypatch.setattr(llm.training.callbacks.checkpointing, "save_checkpoint", save_and_lose_the_lock)
    outcome = train(*tiny_options, "--checkpointing_steps", "5", "--output_dir", run)
    assert outcome.code == 1
    message = f"the lock {run / 'run.lock'} is held by another run now (process 7 on another-host)"
    assert outcome.err.count(f"error: {message}") == 1
    assert "Traceback" not in outcome.err
    assert message in (run / "log.txt").read_text()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_5"]
    assert (run / "status.json").read_text() == "status of the other run"
    assert json.loads((run / "run.lock").read_text())["pid"] == 7
    assert not (run / "model.safetensors").exists()


def test_resume_when_the_text_is_another_then_is_refused_before_weights_are_loaded(
    train: Train, tiny_options: list[str], tmp_path: Path, tiny_text: Path
) -> None:
    words = [*tiny_options, "--max_train_steps", "2", "--checkpointing_steps", "1", "--output_dir", tmp_path / "run"]
    assert train(*words).code == 0
    (tmp_path / "other.txt").write_text(tiny_text.read_text()[100:])
    outcome = train(*words, "--train_file", tmp_path / "other.txt", "--resume_from_checkpoint")
    assert outcome.code == 1
    assert "other text" in outcome.err
    assert "weights:" not in outcome.out
