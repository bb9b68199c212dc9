"""Progress bar on a terminal, and none without a terminal."""

from __future__ import annotations

import sys
import time

import pytest

from llm.data.preparation import progress_bar
from llm.data.preparation.progress_bar import text_progress_bar
from llm.data.preparation.tokenize import TokenizeProgress


def test_text_progress_bar_when_no_terminal_then_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with text_progress_bar() as on_progress:
        assert on_progress is None
    assert capsys.readouterr().err == ""


def test_text_progress_bar_when_on_a_terminal_then_shows_megabytes_speed_tokens_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress_bar, "_DELAY_SECONDS", 0)
    with text_progress_bar() as on_progress:
        assert on_progress is not None
        for number in (1, 2):
            # An earlier attempt tokenized half of the text; now a tenth of the rest takes two seconds.
            num_bytes = 50_000_000 + 5_000_000 * number
            time.sleep(0.15)  # the bar is drawn ten times a second
            on_progress(TokenizeProgress(num_bytes, 50_000_000, 100_000_000, 14_000_000, 3, 2.0 * number))
    lines = capsys.readouterr().err.split("\r")
    shown = next(line for line in lines if "60.0M/100M" in line)
    assert "14.0M tokens" in shown
    assert "2.50MB/s" in shown and "<00:16" in shown
