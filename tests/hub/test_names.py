"""Errors for names that cannot be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from llm.hub import names
from llm.hub.names import name_error, nearest, suggestion


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "cached_model_names", lambda: ["me/my-gpt"])


def _wrapped(cause: BaseException) -> OSError:
    error = OSError("a long story\nover several lines")
    error.__cause__ = cause
    return error


def _not_found() -> RepositoryNotFoundError:
    return RepositoryNotFoundError.__new__(RepositoryNotFoundError)


def test_nearest_when_letters_are_swapped_then_returns_the_name() -> None:
    assert nearest("gtp2", ["gpt2", "facebook/opt-125m"]) == ["gpt2"]


def test_nearest_when_the_owner_is_missing_then_returns_the_full_name() -> None:
    assert nearest("opt-125M", ["facebook/opt-125m"]) == ["facebook/opt-125m"]


def test_suggestion_when_no_name_is_similar_then_is_empty() -> None:
    assert suggestion("zzzzzz", ["gpt2"]) == ""


def test_name_error_when_not_on_the_hub_then_names_the_nearest() -> None:
    text = str(name_error("--tokenizer_name", "gtp2", "a tokenizer", _wrapped(_not_found())))
    assert "no such model on the Hub" in text
    assert "did you mean gpt2" in text
    assert "\n" not in text


def test_name_error_when_offline_then_names_the_cache() -> None:
    error = _wrapped(LocalEntryNotFoundError("no"))
    text = str(name_error("--model_name_or_path", "my/my-gpt", "config.json", error))
    assert "Hub cannot be reached" in text
    assert "not in the cache" in text
    assert "me/my-gpt" in text


@pytest.mark.parametrize("name", ["./runs/dema", "runs/x/y"])
def test_name_error_when_a_folder_was_meant_then_does_not_mention_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    text = str(name_error("--model_name_or_path", name, "config.json", _wrapped(_not_found())))
    assert f"{name}: no such folder" in text
    assert "Hub" not in text
    assert ("demo" in text) == (name == "./runs/dema")
