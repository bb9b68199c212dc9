"""The main program and the Hub: names planted in its cache, no network, and a stand-in to push to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_cache import plant_model
from tests.hub_server import TOKEN, StandInHub, stand_in_hub


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with stand_in_hub() as server:
        yield server


def offline(cache: Path) -> dict[str, str]:
    """An environment whose Hub is at an address where nobody listens; HF_HUB_OFFLINE is not set."""
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return {**kept, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(cache)}


def run(*words: str | Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=170, check=False, env=env)


def test_the_missions_line_when_gpt2_is_in_the_cache_then_trains_it(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    plant_model(tmp_path / "hub", "gpt2", tiny_gpt2_dir)
    result = run(
        *("-m", "accelerate.commands.launch", "-m", "llm.trainers.gpt", "--model_name_or_path", "gpt2"),
        *("--max_train_steps", "3", "--max_eval_batches", "2", "--output_dir", tmp_path / "run"),
        env=offline(tmp_path / "hub"),
    )
    assert result.returncode == 0, result.stderr
    assert "no data named: training on builtin:python" in result.stdout
    assert "weights: loaded from gpt2" in result.stdout
    assert "step 3/3" in result.stdout
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["step"] == 3


def test_offline_when_every_name_is_on_the_hub_then_is_found_out_once(
    tiny_gpt2_dir: Path, tiny_text: Path, tmp_path: Path
) -> None:
    plant_model(tmp_path / "hub", "me/tiny", tiny_gpt2_dir)
    started = time.monotonic()
    result = run(
        *("-m", "llm.trainers.gpt", "--config_name", "me/tiny", "--tokenizer_name", "me/tiny"),
        *("--train_file", tiny_text, "--block_size", "32", "--max_train_steps", "1"),
        env=offline(tmp_path / "hub"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the Hub cannot be reached") == 1
    # The libraries' own retries would take half a minute a name.
    assert time.monotonic() - started < 60


def test_offline_when_a_name_is_not_in_the_cache_then_says_so_in_one_line(tiny_text: Path, tmp_path: Path) -> None:
    result = run(
        *("-m", "llm.trainers.gpt", "--model_name_or_path", "gpt2", "--train_file", tiny_text),
        env=offline(tmp_path / "hub"),
    )
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "gpt2" in errors[0]
    assert "Traceback" not in result.stderr


def push(hub: StandInHub, options: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return run(
        *("-m", "llm.trainers.gpt", *options, "--output_dir", folder, "--checkpointing_steps", "10"),
        *("--push_to_hub", "--hub_model_id", "someone/tiny", "--hub_token", TOKEN),
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"},
    )


def test_push_when_the_run_is_done_then_the_hub_holds_weights_tokenizer_and_card(
    hub: StandInHub, tiny_options: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    result = push(hub, tiny_options, folder)
    assert result.returncode == 0, result.stderr
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert hub.files[f"someone/tiny/{name}"] == (folder / name).read_bytes()
    assert not [name for name in hub.files if "checkpoint" in name or name.endswith(("log.txt", "config.toml"))]
    assert TOKEN not in result.stdout + result.stderr
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_push_when_it_fails_then_the_folder_is_whole_and_the_mend_is_said(
    hub: StandInHub, tiny_options: list[str], tmp_path: Path
) -> None:
    hub.fail["/commit/"] = 500
    folder = tmp_path / "run"
    result = push(hub, tiny_options, folder)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "hf upload someone/tiny" in errors[0]
    assert TOKEN not in result.stdout + result.stderr
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"


def test_push_when_the_token_is_wrong_then_is_refused_before_training(
    hub: StandInHub, tiny_options: list[str], tmp_path: Path
) -> None:
    result = run(
        *("-m", "llm.trainers.gpt", *tiny_options, "--output_dir", tmp_path / "run"),
        *("--push_to_hub", "--hub_model_id", "someone/tiny", "--hub_token", "hf_wrong"),
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"},
    )
    assert result.returncode == 1
    assert "step 1" not in result.stdout
    assert "hf_wrong" not in result.stdout + result.stderr
