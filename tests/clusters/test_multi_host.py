"""What starts the agents."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

import llm.clusters.multi_host
from llm.clusters.allocation import JobAllocation
from llm.clusters.multi_host import spread
from llm.config.errors import UserError


def test_program_when_it_neither_ends_nor_hears_then_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = tmp_path / "deaf"
    deaf.write_text(f"#!/bin/sh\ntrap '' TERM\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    deaf.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(deaf))
    monkeypatch.setattr(llm.clusters.multi_host, "_GRACE_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(UserError, match="deaf did not end within 2 s"):
        spread(JobAllocation(("a",)), [], os.environ, limit_seconds=2)
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
