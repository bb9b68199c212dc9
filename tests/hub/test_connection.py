"""The probe of the Hub and the offline mode; tests that depend on import order run in new processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from llm.hub import connection
from llm.hub.connection import come_online, detect, go_offline, hub_is_reachable, names_on_hub
from tests.hub_cache import plant_model


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield
    come_online()


@pytest.fixture
def answering() -> Iterator[tuple[str, list[str]]]:
    """The URL of a server on 127.0.0.1 that answers 401 to every request, and the methods of its requests."""
    methods: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            methods.append(self.command)
            self.send_response(401)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", methods
    server.shutdown()
    server.server_close()


def test_hub_is_reachable_when_the_hub_answers_then_is_true_after_one_request(
    answering: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", answering[0])
    assert hub_is_reachable()
    assert answering[1] == ["HEAD"]


def test_hub_is_reachable_when_the_user_set_offline_mode_then_is_false_without_a_request(
    answering: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", answering[0])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_is_reachable()
    assert answering[1] == []


def test_hub_is_reachable_when_the_server_is_silent_then_is_false_within_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # accepts connections and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert not hub_is_reachable(timeout_seconds=0.3)
        assert time.monotonic() - start < 1.5


def test_hub_is_reachable_when_names_do_not_resolve_then_is_false_within_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hang(*args: object, **kwargs: object) -> object:
        time.sleep(2)
        raise socket.gaierror("no name server")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    start = time.monotonic()
    assert not hub_is_reachable(timeout_seconds=0.3)
    assert time.monotonic() - start < 1.5


def test_go_offline_when_libraries_are_imported_then_changes_them_and_can_be_undone() -> None:
    import datasets.config
    import huggingface_hub

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = False
    go_offline()
    assert huggingface_hub.is_offline_mode() and datasets.config.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    come_online()
    assert not huggingface_hub.is_offline_mode() and not datasets.config.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ
    datasets.config.HF_HUB_OFFLINE = before


def test_come_online_when_the_user_set_offline_mode_then_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    go_offline()
    come_online()
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


def test_names_on_hub_when_local_or_of_this_package_then_leaves_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "local").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [None, "", "gpt2", "builtin:python", "train:bpe", "me/local", "~/me", str(tmp_path), "me/remote"]
    assert names_on_hub(names) == ["gpt2", "me/remote"]


@pytest.mark.parametrize(
    ("names", "push", "answers", "reachable", "num_probes"),
    [
        (["gpt2"], False, True, True, 1),
        (["gpt2"], False, False, False, 1),
        ([], True, True, True, 1),
        ([], False, True, False, 0),
    ],
)
def test_detect_when_nothing_is_needed_or_the_hub_is_silent_then_goes_offline(
    names: list[str],
    push: bool,
    answers: bool,
    reachable: bool,
    num_probes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probes: list[bool] = []

    def probe() -> bool:
        probes.append(True)
        return answers

    monkeypatch.setattr(connection, "hub_is_reachable", probe)
    assert detect(names, push=push) is reachable
    assert constants.is_offline_mode() is not reachable
    assert len(probes) == num_probes


def test_detect_when_rank_0_has_probed_then_the_other_ranks_take_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "hub_is_reachable", lambda: pytest.fail("probed on another rank than 0"))
    assert detect(["gpt2"], run_on_main=lambda probe: True)
    assert not constants.is_offline_mode()
    assert not detect(["gpt2"], run_on_main=lambda probe: False)
    assert constants.is_offline_mode()


LOAD_BY_NAME = """
import time
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from llm.hub.connection import go_offline, hub_is_reachable
start = time.monotonic()
assert not hub_is_reachable(1.0)
go_offline()
AutoConfig.from_pretrained("gpt2")
AutoTokenizer.from_pretrained("gpt2")
model = AutoModelForCausalLM.from_pretrained("gpt2")
print(model.config.n_layer, time.monotonic() - start)
"""


def test_from_pretrained_when_offline_then_loads_a_cached_name_at_once(tmp_path: Path, tiny_gpt2_dir: Path) -> None:
    plant_model(tmp_path, "gpt2", tiny_gpt2_dir)
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    # No server listens on this port, which stands for a machine without a network.
    environment |= {"HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD_BY_NAME],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    num_layers, seconds = result.stdout.split()
    assert num_layers == "2"
    assert float(seconds) < 40  # with retries it takes more than a minute, also on a fast machine
