"""The log lines and JSON records of a benchmark; `tests/test_bench.py` runs the command."""

from __future__ import annotations

from typing import Any

import pytest

from llm.config.errors import UserError
from llm.config.options import Options
from llm.training.profiling import benchmark
from llm.training.profiling.measure import Measurement

FACTS: dict[str, Any] = {
    "flops_per_token": 2e6,
    "measured_flops": 4e9,
    "data_sheet_flops": 8e9,
    "arithmetic": "float32",
}


def measured(communication_seconds: float | None = None, period: int = 1) -> Measurement:
    return Measurement(
        micro_batch=4,
        tokens=1000,
        seconds=(0.9, 1.0, 1.3),
        cpu_seconds=2.0,
        data_seconds=0.1,
        phase_seconds={"forward": 0.3, "backward": 0.5, "optimizer": 0.1},
        communication_seconds=communication_seconds,
        peak_bytes=1_000_000,
        period=period,
    )


def test_record_when_measured_then_speeds_and_shares_follow_from_the_median() -> None:
    record = benchmark._record(measured(), FACTS)
    assert record["tokens_per_second"] == pytest.approx(1000)
    assert record["flops"] == pytest.approx(2e9)
    assert record["share_of_measured_flops"] == pytest.approx(0.5)
    assert record["mfu"] == pytest.approx(0.25)
    assert sum(record["shares"].values()) == pytest.approx(1)
    assert benchmark._record(measured(), FACTS | {"data_sheet_flops": None})["mfu"] is None


def test_lines_when_measured_then_show_time_speed_mfu_memory_and_shares() -> None:
    lines = benchmark._lines(measured(), FACTS)
    assert lines[0] == "update: 1000.0 ms, the median of 3 (900.0 to 1300.0; CPU 2000.0), of 1,000 tokens"
    assert lines[1] == "speed: 1k tok/s"
    assert "50.0% of what this device does in float32 products" in lines[2] and lines[2].endswith("MFU 25.0%")
    assert lines[3].startswith("memory: 1MB")
    assert lines[4] == "time: forward 30.0%, backward 50.0%, optimizer 10.0%, data wait 10.0%, rest 0.0%"
    assert len(lines) == 5


def test_lines_when_ranks_communicate_or_updates_differ_then_say_so() -> None:
    lines = benchmark._lines(measured(communication_seconds=0.0125, period=4), FACTS | {"data_sheet_flops": None})
    assert "the median of 3 means of 4 (" in lines[0]
    assert "MFU" not in lines[2]
    assert lines[5].startswith("communication: 12.5 ms of an update")


def test_sweep_line_when_measured_then_names_the_size_and_its_speed() -> None:
    assert benchmark._sweep_line(measured(), FACTS) == (
        "micro_batch 4 | 1000.0 ms | 1k tok/s | 50.0% of the products' rate | 1MB"
    )


def test_config_when_the_vocabulary_depends_on_a_text_then_is_refused() -> None:
    options = Options.model_validate({"tokenizer": {"tokenizer_name": "char"}})
    with pytest.raises(UserError, match="--train_file"):
        benchmark._config_without_text(options)


def test_require_writable_when_the_file_is_new_then_leaves_none_and_an_old_file_is_kept(tmp_path: Any) -> None:
    file = tmp_path / "folder" / "bench.json"
    benchmark._require_writable("json_file", str(file))
    assert file.parent.is_dir() and not file.exists()
    file.write_text("old")
    benchmark._require_writable("json_file", str(file))
    assert file.read_text() == "old"
    with pytest.raises(UserError, match=r"--json_file .* cannot be written"):
        benchmark._require_writable("json_file", str(tmp_path))
