"""Curves of runs, and the records they are drawn from."""

from __future__ import annotations

import builtins
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.config.errors import UserError
from llm.report.curves import _read_records, _series, _smooth, _x_axis, draw_curves
from tests.metrics_file import write_metrics

PNG = b"\x89PNG\r\n\x1a\n"


def test_draw_curves_when_one_run_then_draws_training_and_evaluation(tmp_path: Path) -> None:
    from PIL import Image

    output = tmp_path / "new folder" / "curves.png"
    draw_curves({"run": write_metrics(tmp_path / "metrics.jsonl")}, output)
    assert output.read_bytes().startswith(PNG)
    pixels = np.asarray(Image.open(output).convert("RGB")).reshape(-1, 3)
    colors = {tuple(pixel) for pixel in pixels[::3].tolist()}
    assert (0x00, 0x72, 0xB2) in colors  # training
    assert (0xD5, 0x5E, 0x00) in colors  # evaluation


def test_draw_curves_when_runs_are_compared_then_each_has_a_color(tmp_path: Path) -> None:
    from PIL import Image

    runs = {name: write_metrics(tmp_path / f"{name}.jsonl", floor=f) for name, f in [("a", 1), ("b", 2)]}
    draw_curves(runs, tmp_path / "both.png", x="tokens", smoothing=5)
    pixels = np.asarray(Image.open(tmp_path / "both.png").convert("RGB")).reshape(-1, 3)
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= {tuple(p) for p in pixels.tolist()}


def test_draw_curves_when_there_are_only_evaluations_then_draws_them(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 5, "eval_loss": 2.0}\n')
    draw_curves({"run": tmp_path / "m.jsonl"}, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)


def test_read_records_when_the_last_line_is_incomplete_then_skips_it_without_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_metrics(tmp_path / "m.jsonl")
    expected = _read_records(path)
    with path.open("a") as file:
        file.write('{"step": 210, "lo')
    assert _read_records(path) == expected
    assert not caplog.records


def test_read_records_when_another_line_is_broken_then_warns_with_its_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "l{"st\n{"step": 3, "loss": 2}\n')
    assert [r["step"] for r in _read_records(tmp_path / "m.jsonl").training] == [1, 3]
    assert "line 2" in caplog.text


def test_read_records_when_a_step_occurs_twice_then_keeps_the_later_record(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    steps = [(10, 3.0), (20, 2.5), (30, 2.4), (20, 2.6)]
    path.write_text("".join(f'{{"step": {s}, "loss": {v}}}\n' for s, v in steps))
    assert [(r["step"], r["loss"]) for r in _read_records(path).training] == [(10, 3.0), (20, 2.6)]


def test_read_records_when_there_are_samples_then_skips_them(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 5, "loss": 3.0}\n{"step": 5, "samples": ["text"]}\n')
    assert _read_records(path).training == [{"step": 5, "loss": 3.0}]


def test_series_when_values_are_not_finite_then_leaves_them_out() -> None:
    records = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": None},
    ]
    series = _series(records, "loss")
    assert series is not None
    assert series[0].tolist() == [1.0]
    assert _series(records, "lr") is None


def test_smooth_when_values_are_constant_then_is_constant_and_when_a_ramp_then_lags() -> None:
    assert np.allclose(_smooth(np.full(9, 2.5), span=5), 2.5)
    ramp = np.arange(200, dtype=np.float64)
    assert _smooth(ramp, span=1).tolist() == ramp.tolist()
    assert _smooth(ramp, span=9)[-1] == pytest.approx(ramp[-1] - 4, abs=1e-6)  # (span - 1) / 2


def test_x_axis_when_unit_is_tokens_then_interpolates_between_records(tmp_path: Path) -> None:
    records = _read_records(write_metrics(tmp_path / "m.jsonl"))
    assert _x_axis(records, "tokens")(np.array([15.0])).tolist() == [15 * 512]
    assert _x_axis(records, "step")(np.array([15.0])).tolist() == [15.0]


@pytest.mark.parametrize(
    ("content", "line"),
    [(None, "no such file"), ("", "no records yet"), ('{"a": 1}', "no records yet")],
)
def test_draw_curves_when_there_is_nothing_to_draw_then_refuses(tmp_path: Path, content: str | None, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=line):
        draw_curves({"run": path}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_draw_curves_when_tokens_were_not_counted_then_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    with pytest.raises(UserError, match="leave out --x tokens"):
        draw_curves({"run": tmp_path / "m.jsonl"}, tmp_path / "c.png", x="tokens")


def test_draw_curves_when_matplotlib_is_missing_then_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original_import = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(UserError, match=r"pip install llm-trainers\[plot\]"):
        draw_curves({"run": write_metrics(tmp_path / "m.jsonl")}, tmp_path / "c.png")
