"""``python -m llm.generate``, from the command line to the text."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm.generate import find_model, main
from tests.hub_cache import plant_model

SHORT = ["--max_new_tokens", "8", "--use_cpu", "--seed", "0"]


def test_generate_when_three_samples_are_requested_then_each_has_a_heading(
    tiny_gpt2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_gpt2_dir), "--prompt", "the king", "--num_samples", "3", *SHORT]) == 0
    out = capsys.readouterr().out
    texts = out.split("--- sample ")[1:]
    assert [text.split(" -")[0] for text in texts] == ["1 of 3", "2 of 3", "3 of 3"]
    assert all("\nthe king" in text for text in texts)


def test_generate_when_the_seed_is_the_same_then_the_text_is_the_same(
    tiny_gpt2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    for seed in ("1", "1", "2"):
        assert main([str(tiny_gpt2_dir), *SHORT, "--seed", seed]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] != written[2]


def test_generate_when_no_seed_is_given_then_prints_the_drawn_one(
    tiny_gpt2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tiny_gpt2_dir), "--max_new_tokens", "8", "--use_cpu"]
    assert main(command) == 0
    first = capsys.readouterr()
    assert main([*command, *first.err.split()]) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert second.err == ""


def test_generate_when_the_prompt_is_a_dash_then_reads_the_standard_input(
    tiny_gpt2_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("queen and\n"))
    assert main([str(tiny_gpt2_dir), "--prompt", "-", *SHORT]) == 0
    assert capsys.readouterr().out.startswith("queen and")


def test_find_model_when_a_run_is_unfinished_then_returns_its_newest_checkpoint(
    tmp_path: Path, tiny_gpt2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (9, 10):
        shutil.copytree(tiny_gpt2_dir, tmp_path / "checkpoints" / f"step_{step}")
    newest = str(tmp_path / "checkpoints" / "step_10")
    assert find_model(str(tmp_path)) == newest
    assert newest in capsys.readouterr().err
    assert main([newest, *SHORT]) == 0


@pytest.mark.parametrize("files", [[], ["config.json"], ["config.json", "model.safetensors"]])
def test_generate_when_files_are_missing_from_the_folder_then_one_line(
    tmp_path: Path, tiny_gpt2_dir: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        shutil.copy(tiny_gpt2_dir / name, tmp_path)
    assert main([str(tmp_path), *SHORT]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}: no {'tokenizer' if files else 'model'}")
    assert error.count("\n") == 1


def test_generate_when_options_are_wrong_then_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--top_k", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: --top_k 0: must be a whole number >= 1"
    assert lines[1].startswith("error: --model: required")


def environment_without_network(hub_cache: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    return kept | {"HF_HUB_CACHE": str(hub_cache), "HF_ENDPOINT": "http://127.0.0.1:9"}


def test_generate_when_offline_then_finds_a_cached_name(tmp_path: Path, tiny_gpt2_dir: Path) -> None:
    plant_model(tmp_path, "gpt2", tiny_gpt2_dir)
    done = subprocess.run(
        [sys.executable, "-m", "llm.generate", "gpt2", "--num_samples", "2", *SHORT],
        env=environment_without_network(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--- sample 1 of 2 ---")
    assert done.stderr == "the Hub cannot be reached: looking into the local cache\n"


def test_generate_when_the_name_is_unknown_then_suggests_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["gtp2", *SHORT]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: gtp2: ")
    assert "did you mean gpt2" in error
    assert error.count("\n") == 1


def test_help_when_requested_then_torch_is_not_imported() -> None:
    script = (
        "import sys, llm.bench, llm.generate, llm.plot, llm.prepare, llm.runs\n"
        "for command in (llm.bench, llm.generate, llm.plot, llm.prepare, llm.runs):\n"
        "    try: command.main(['--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'huggingface_hub'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in ("--sweep", "--num_samples", "--smoothing", "--shard_size", "--verify"):
        assert name in done.stdout
