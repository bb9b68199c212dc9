"""Pushes to a local stand-in for the Hub: uploaded files, refusals, and no leak of the token."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from llm.config.errors import UserError
from llm.hub.connection import come_online, go_offline
from llm.hub.push import check_hub_access, finished_files, push_folder, resolve_repo_id
from llm.training.run_dir.layout import FINISHED_FILES, PRIVATE_FILES
from tests.hub_server import TOKEN, StandInHub, stand_in_hub


def push(folder: Path, repo_id: str | None, token: str | None) -> str:
    """`push_folder` with the files of a run."""
    return push_folder(folder, repo_id, token, uploaded=FINISHED_FILES, excluded=PRIVATE_FILES)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with stand_in_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        yield server
    come_online()


@pytest.fixture
def run_dir(tmp_path: Path, tiny_gpt2_dir: Path) -> Path:
    """A run's folder: the tiny model and all other files that a run leaves."""
    folder = tmp_path / "my-gpt"
    folder.mkdir()
    for path in tiny_gpt2_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# my-gpt\n")
    (folder / "curves.png").write_bytes(b"\x89PNG, more or less")
    for name in ("all_results.json", "status.json", "metrics.jsonl", "config.toml", "log.txt"):
        (folder / name).write_text("{}\n")
    (folder / "checkpoints" / "step_1").mkdir(parents=True)
    (folder / "checkpoints" / "step_1" / "model.safetensors").write_bytes(b"0")
    (folder / "my-secret-notes.txt").write_text("mine")
    return folder


def test_push_folder_when_the_hub_works_then_it_holds_the_finished_files_byte_for_byte(
    hub: StandInHub, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = push(run_dir, "my-gpt", TOKEN)
    assert url == f"{hub.endpoint}/someone/my-gpt"
    uploaded = {name.removeprefix("someone/my-gpt/"): content for name, content in hub.files.items()}
    assert uploaded == {path.name: path.read_bytes() for path in finished_files(run_dir, FINISHED_FILES)}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(uploaded)
    assert "curves.png" in uploaded
    run_only = {"status.json", "metrics.jsonl", "config.toml", "log.txt", "my-secret-notes.txt"}
    assert not run_only & set(uploaded)
    assert sum("/commit/" in request for request in hub.requests) == 1
    assert TOKEN not in caplog.text
    assert not [p for p in run_dir.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_push_folder_when_the_commit_fails_then_names_the_command_without_the_token(
    hub: StandInHub, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.fail["/commit/"] = 500
    with pytest.raises(UserError, match="the finished folder is kept") as failure:
        push(run_dir, "my-gpt", TOKEN)
    line = str(failure.value)
    assert f"hf upload someone/my-gpt {run_dir} . --exclude 'checkpoints/*'" in line
    assert "\n" not in line
    assert TOKEN not in line + caplog.text
    assert failure.value.exit_code == 1
    assert not hub.files


def test_push_folder_when_the_token_is_unknown_then_names_the_login(hub: StandInHub, run_dir: Path) -> None:
    with pytest.raises(UserError, match=r"does not know the access token.*hf auth login"):
        push(run_dir, "me/my-gpt", "hf_wrongToken123")


def test_push_folder_when_the_token_cannot_write_then_names_the_permission(hub: StandInHub, run_dir: Path) -> None:
    hub.fail["/api/repos/create"] = 403
    with pytest.raises(UserError, match="write permission") as failure:
        push(run_dir, "other/my-gpt", TOKEN)
    assert "hf upload other/my-gpt" in str(failure.value)


def test_push_folder_when_the_hub_does_not_answer_then_fails_in_one_line(
    hub: StandInHub, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"no answer from http://127.0.0.1:9.*hf upload me/my-gpt"):
        push(run_dir, "me/my-gpt", TOKEN)


def test_push_folder_when_the_run_went_offline_before_then_connects_again(hub: StandInHub, run_dir: Path) -> None:
    go_offline()
    assert push(run_dir, "my-gpt", TOKEN).endswith("someone/my-gpt")


def test_push_folder_when_there_are_no_weights_then_raises(hub: StandInHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weights \(model.safetensors\)"):
        push(tmp_path, "my-gpt", TOKEN)


def test_push_folder_when_called_in_a_new_process_then_needs_only_the_environment(
    hub: StandInHub, run_dir: Path
) -> None:
    script = (
        "import sys; from pathlib import Path; from llm.hub.push import push_folder\n"
        "print(push_folder(Path(sys.argv[1]), None, None, uploaded=('*.json', '*.safetensors'), excluded=()))"
    )
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(run_dir)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == f"{hub.endpoint}/someone/my-gpt", done.stderr
    weights = (run_dir / "model.safetensors").read_bytes()
    assert hub.files["someone/my-gpt/model.safetensors"] == weights
    assert TOKEN not in done.stdout + done.stderr


def test_check_hub_access_when_the_token_can_write_then_creates_the_repository(hub: StandInHub, tmp_path: Path) -> None:
    assert check_hub_access(None, tmp_path / "my-gpt", TOKEN) == "someone/my-gpt"
    assert check_hub_access("my-gpt", tmp_path, TOKEN) == "someone/my-gpt"
    assert hub.repositories == ["someone/my-gpt"]


def test_check_hub_access_when_there_is_no_token_then_names_the_login(hub: StandInHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"HF_TOKEN.*hf auth login"):
        check_hub_access("me/my-gpt", tmp_path, None)
    assert not hub.requests


@pytest.mark.parametrize(("status", "fix"), [(401, "hf auth login"), (403, "write permission")])
def test_check_hub_access_when_the_hub_refuses_then_names_the_fix(
    hub: StandInHub, tmp_path: Path, status: int, fix: str
) -> None:
    hub.fail["/api/repos/create"] = status
    with pytest.raises(UserError, match=fix) as failure:
        check_hub_access("me/my-gpt", tmp_path, TOKEN)
    assert TOKEN not in str(failure.value)


def test_check_hub_access_when_the_hub_does_not_answer_then_only_warns(
    hub: StandInHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert check_hub_access("me/my-gpt", tmp_path, TOKEN) is None
    assert "push at the end will be tried" in caplog.text


@pytest.mark.parametrize("name", ["a/b/c", "my gpt", "-gpt", "a--b", "a..b", "gpt.git", "x" * 97])
def test_resolve_repo_id_when_the_name_is_invalid_then_raises(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--hub_model_id such as me/my-gpt"):
        resolve_repo_id(name, tmp_path, TOKEN)


@pytest.mark.parametrize("name", ["me/my-gpt", "me/GPT_2.v1", "a/b"])
def test_resolve_repo_id_when_the_name_is_full_then_keeps_it(tmp_path: Path, name: str) -> None:
    assert resolve_repo_id(name, tmp_path, TOKEN) == name
