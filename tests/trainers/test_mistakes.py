"""Tests of mistakes in options and files: one line with the cause and what to do, before the model is built."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome

Train = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a model is built."""
    import llm.training.build

    def build(*_: object, **__: object) -> None:
        pytest.fail("a model was built before the mistake was reported")

    monkeypatch.setattr(llm.training.build, "build_model", build)


def one_line(outcome: Outcome, code: int) -> str:
    """Return the only error line of a command, which must have exited with this code and without a traceback."""
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, outcome.err
    return lines[0]


def replaced(options: list[str], name: str, *values: str | Path) -> list[str]:
    """Return the options with the value of one of them replaced."""
    at = options.index(name)
    return [*options[:at], name, *map(str, values), *options[at + 2 :]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--lerning_rate", "1"), "--learning_rate"),
        (("--learning_rate", "fast"), "fast"),
        (("--per_device_train_batch_size", "0"), ">= 1"),
        (("--lr_scheduler_type", "cosin"), "cosine"),
        (("--lr_scheduler_type", "greedy"), "greedy is refused"),
        (("--lr_scheduler_type", "reduce_lr_on_plateau"), "reduce_lr_on_plateau is refused"),
        (("--mixed_precision", "fp8"), "Conv1D"),
        (("--kfac", "--kfac_backend", "kfac-pytorch", "--kfac_factor_tokens", "8"), "--kfac_factor_tokens needs"),
        (("--kfac", "--kfac_compat", "--kfac_spread"), "--kfac_spread cannot be combined"),
        (("--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"nonsense": 1}'), "nonsense"),
    ],
)
def test_option_when_wrong_then_one_line_and_exit_code_2(
    train: Train, tiny_options: list[str], words: tuple[str, ...], expected: str
) -> None:
    assert expected in one_line(train(*tiny_options, *words), 2)


def test_toml_when_a_key_is_unknown_then_names_the_file_and_the_nearest_key(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[optimizer]\nlerning_rate = 1e-3\n")
    line = one_line(train("--config", path), 2)
    for word in ("run.toml", "optimizer.lerning_rate", "learning_rate"):
        assert word in line


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.txt", b"", "empty"),
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), "byte 3"),
        ("binary.txt", b"text\0\1\2", "byte 4"),
        ("table.csv", b"title,body\na,b\n", "body"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("array.json", b'[{"text": "a"},\n{"text": }]', "line 2"),
        ("text.docx", b"x", "docx"),
        ("broken.parquet", b"PAR1 not really", "parquet"),
        ("broken.txt.gz", b"\x1f\x8b\x08 not really", "gz"),
    ],
)
def test_file_when_it_cannot_be_read_then_names_the_file_and_the_position(
    train: Train, tiny_options: list[str], tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    line = one_line(train(*replaced(tiny_options, "--train_file", path)), 1)
    assert expected in line
    assert name in line


def test_file_when_missing_then_names_the_nearest_file(train: Train, tiny_options: list[str], tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("to be")
    line = one_line(train(*replaced(tiny_options, "--train_file", tmp_path / "shakespear.txt")), 1)
    assert "shakespeare.txt" in line


def test_text_when_shorter_than_a_block_then_names_the_tokens_needed(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("to be")
    line = one_line(train(*replaced(tiny_options, "--train_file", path)), 1)
    assert "33" in line


def test_block_size_when_larger_than_the_models_positions_then_is_refused_before_the_text_is_read(
    train: Train, tiny_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import llm.data.streaming.dataset

    monkeypatch.setattr(llm.data.streaming.dataset, "prepare_dataset", lambda *_: pytest.fail("the text was read"))
    line = one_line(train(*replaced(tiny_options, "--block_size", "65")), 1)
    assert "64 tokens" in line


def test_global_batch_size_when_it_is_not_divisible_then_names_sizes_that_work(
    train: Train, tiny_options: list[str]
) -> None:
    line = one_line(train(*tiny_options, "--global_batch_size", "12"), 1)
    assert "1, 2, 3, 4, 6, 12" in line


def test_tokenizer_name_when_the_folder_has_no_tokenizer_then_is_refused(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    line = one_line(train(*replaced(tiny_options, "--tokenizer_name", tmp_path / "folder")), 1)
    assert "no tokenizer" in line


def test_vocabulary_when_its_size_is_not_that_of_the_weights_then_is_refused(
    train: Train, tiny_text: Path, byte_tokenizer, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=2000, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = ["--model_name_or_path", tmp_path / "model", "--tokenizer_name", tmp_path / "tokenizer"]
    line = one_line(train("--train_file", tiny_text, *words), 1)
    assert "2000" in line
    assert "257" in line


def test_model_name_when_unknown_then_names_the_nearest_model(train: Train, tiny_text: Path) -> None:
    line = one_line(train("--train_file", tiny_text, "--model_name_or_path", "gtp2"), 1)
    assert "gpt2" in line


def test_fp16_when_on_a_cpu_then_is_refused(train: Train, tiny_options: list[str]) -> None:
    assert "fp16" in one_line(train(*tiny_options, "--mixed_precision", "fp16"), 1)


def test_output_dir_when_it_cannot_be_written_then_is_refused(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    # A file stands where a folder is needed, because permissions do not stop root.
    (tmp_path / "file").write_text("")
    line = one_line(train(*tiny_options, "--output_dir", tmp_path / "file" / "run"), 1)
    assert "cannot be written" in line


def test_tracker_when_unknown_not_installed_or_not_logged_in_then_is_refused(
    train: Train, tiny_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import llm.training.run_dir.trackers

    monkeypatch.setattr(llm.training.run_dir.trackers, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    monkeypatch.setattr(llm.training.run_dir.trackers, "_wandb_is_logged_in", lambda: False)
    tracking = [*tiny_options, "--with_tracking", "--report_to"]
    assert "unknown tracker" in one_line(train(*tracking, "wandbb"), 1)
    assert "pip install mlflow" in one_line(train(*tracking, "mlflow"), 1)
    assert "wandb login" in one_line(train(*tracking, "wandb"), 1)


def test_launcher_when_it_left_out_rank_and_world_size_then_is_refused(
    train: Train, tiny_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "torchrun" in one_line(train(*tiny_options), 1)


def test_failed_run_when_it_has_a_folder_then_its_status_has_the_reason(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    options = replaced(tiny_options, "--block_size", "65")
    assert train(*options, "--output_dir", tmp_path / "run").code == 1
    status = (tmp_path / "run" / "status.json").read_text()
    assert '"failed"' in status
    assert "64 tokens" in status
    assert not os.path.exists(tmp_path / "run" / "run.lock")
