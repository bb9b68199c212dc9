"""Tests of the main program and the Hub: models planted in its cache, no network, and a stand-in server to push to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from llm.hub.connection import come_online
from tests.conftest import Outcome
from tests.hub_cache import plant_model
from tests.hub_server import TOKEN, StandInHub, stand_in_hub

Train = Callable[..., Outcome]

UNREACHABLE = "http://127.0.0.1:9"  # no program listens there


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """The stand-in, which this process uses as the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with stand_in_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        yield server
    come_online()


def offline_environment(cache: Path) -> dict[str, str]:
    """Return an environment with a Hub that cannot be reached, and without HF_HUB_OFFLINE."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return {**environment, "HF_ENDPOINT": UNREACHABLE, "HF_HUB_CACHE": str(cache)}


def run(*words: str | Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python in its own process, whose libraries read the environment when they are imported."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=170, check=False, env=env)


def error_lines(err: str) -> list[str]:
    """Return the lines of a standard error that report an error."""
    return [line for line in err.splitlines() if line.startswith("error: ")]


def test_accelerate_launch_when_gpt2_is_in_the_cache_then_trains_it(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    plant_model(tmp_path / "hub", "gpt2", tiny_gpt2_dir)
    result = run(
        *("-m", "accelerate.commands.launch", "-m", "llm.trainers.gpt", "--model_name_or_path", "gpt2"),
        *("--max_train_steps", "3", "--max_eval_batches", "2", "--output_dir", tmp_path / "run"),
        env=offline_environment(tmp_path / "hub"),
    )
    assert result.returncode == 0, result.stderr
    assert "no data named: training on builtin:python" in result.stdout
    assert "weights: loaded from gpt2" in result.stdout
    assert "step 3/3" in result.stdout
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["step"] == 3


def test_offline_when_every_name_is_on_the_hub_then_the_hub_is_probed_once(
    tiny_gpt2_dir: Path, tiny_text: Path, tmp_path: Path
) -> None:
    plant_model(tmp_path / "hub", "me/tiny", tiny_gpt2_dir)
    started = time.monotonic()
    result = run(
        *("-m", "llm.trainers.gpt", "--config_name", "me/tiny", "--tokenizer_name", "me/tiny"),
        *("--train_file", tiny_text, "--block_size", "32", "--max_train_steps", "1"),
        env=offline_environment(tmp_path / "hub"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the Hub cannot be reached") == 1
    # The libraries' own retries would take half a minute per name.
    assert time.monotonic() - started < 60


def test_offline_when_a_name_is_not_in_the_cache_then_one_line_names_it(
    train: Train, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", UNREACHABLE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    outcome = train("--model_name_or_path", "gpt2", "--train_file", tiny_text)
    come_online()
    assert outcome.code == 1
    (error,) = error_lines(outcome.err)
    assert "gpt2" in error
    assert "Traceback" not in outcome.err


def test_push_when_the_run_is_done_then_the_hub_holds_weights_tokenizer_and_card(
    hub: StandInHub, train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    push = ("--push_to_hub", "--hub_model_id", "someone/tiny", "--hub_token", TOKEN)
    outcome = train(*tiny_options, "--output_dir", folder, "--checkpointing_steps", "10", *push)
    assert outcome.code == 0, outcome.err
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert hub.files[f"someone/tiny/{name}"] == (folder / name).read_bytes()
    assert not [name for name in hub.files if "checkpoint" in name or name.endswith(("log.txt", "config.toml"))]
    assert TOKEN not in outcome.out + outcome.err
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_push_when_it_fails_then_the_folder_is_complete_and_the_error_names_the_upload_command(
    hub: StandInHub, train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    hub.fail["/commit/"] = 500
    folder = tmp_path / "run"
    push = ("--push_to_hub", "--hub_model_id", "someone/tiny", "--hub_token", TOKEN)
    outcome = train(*tiny_options, "--output_dir", folder, "--checkpointing_steps", "10", *push)
    assert outcome.code == 1
    (error,) = error_lines(outcome.err)
    assert "hf upload someone/tiny" in error
    assert TOKEN not in outcome.out + outcome.err
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"


def test_push_when_the_token_is_wrong_then_is_refused_before_training(
    hub: StandInHub, train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    push = ("--push_to_hub", "--hub_model_id", "someone/tiny", "--hub_token", "hf_wrong")
    outcome = train(*tiny_options, "--output_dir", tmp_path / "run", *push)
    assert outcome.code == 1
    assert "step 1" not in outcome.out
    assert "hf_wrong" not in outcome.out + outcome.err
