"""Fixtures of the tests of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """`log_lines()` returns the messages that the package has logged so far."""
    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    caplog.set_level(logging.INFO, "llm")
    return lambda: [record.getMessage() for record in caplog.records]
