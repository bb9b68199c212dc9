"""The picture of a run, and the records it is drawn from."""

from __future__ import annotations

import builtins
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.config.errors import UserError
from llm.report.curves import _places, _read_records, _series, _smoothed, draw_curves
from tests.metrics_file import write_metrics

PNG = b"\x89PNG\r\n\x1a\n"


def test_curves_when_one_run_is_whole_are_a_picture_with_two_panels(tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "new folder" / "curves.png"
    draw_curves({"run": write_metrics(tmp_path / "metrics.jsonl")}, picture)
    assert picture.read_bytes().startswith(PNG)
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    colors = {tuple(pixel) for pixel in pixels[::3].tolist()}
    assert (0x00, 0x72, 0xB2) in colors  # training
    assert (0xD5, 0x5E, 0x00) in colors  # evaluation


def test_curves_when_runs_are_compared_have_a_color_each(tmp_path: Path) -> None:
    from PIL import Image

    runs = {name: write_metrics(tmp_path / f"{name}.jsonl", floor=f) for name, f in [("a", 1), ("b", 2)]}
    draw_curves(runs, tmp_path / "both.png", x="tokens", smoothing=5)
    pixels = np.asarray(Image.open(tmp_path / "both.png").convert("RGB")).reshape(-1, 3)
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= {tuple(p) for p in pixels.tolist()}


def test_curves_when_there_are_only_evaluations_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 5, "eval_loss": 2.0}\n')
    draw_curves({"run": tmp_path / "m.jsonl"}, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)


def test_records_when_the_last_line_is_torn_lack_it_quietly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_metrics(tmp_path / "m.jsonl")
    whole = _read_records(path)
    with path.open("a") as file:
        file.write('{"step": 210, "lo')
    assert _read_records(path) == whole
    assert not caplog.records


def test_records_when_a_line_within_is_broken_say_which(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "l{"st\n{"step": 3, "loss": 2}\n')
    assert [r["step"] for r in _read_records(tmp_path / "m.jsonl").training] == [1, 3]
    assert "line 2" in caplog.text


def test_records_when_steps_were_done_twice_are_the_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    steps = [(10, 3.0), (20, 2.5), (30, 2.4), (20, 2.6)]
    path.write_text("".join(f'{{"step": {s}, "loss": {v}}}\n' for s, v in steps))
    assert [(r["step"], r["loss"]) for r in _read_records(path).training] == [(10, 3.0), (20, 2.6)]


def test_records_when_there_are_samples_among_them_are_the_others(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 5, "loss": 3.0}\n{"step": 5, "samples": ["text"]}\n')
    assert _read_records(path).training == [{"step": 5, "loss": 3.0}]


def test_series_when_values_are_not_finite_leaves_them_out() -> None:
    records = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": None},
    ]
    series = _series(records, "loss")
    assert series is not None
    assert series[0].tolist() == [1.0]
    assert _series(records, "lr") is None


def test_smoothed_when_the_loss_is_constant_is_that_constant_and_else_lags() -> None:
    assert np.allclose(_smoothed(np.full(9, 2.5), span=5), 2.5)
    ramp = np.arange(200, dtype=np.float64)
    assert _smoothed(ramp, span=1).tolist() == ramp.tolist()
    assert _smoothed(ramp, span=9)[-1] == pytest.approx(ramp[-1] - 4, abs=1e-6)  # (span - 1) / 2


def test_places_when_asked_for_tokens_puts_evaluations_between_the_records(tmp_path: Path) -> None:
    records = _read_records(write_metrics(tmp_path / "m.jsonl"))
    assert _places(records, "tokens")(np.array([15.0])).tolist() == [15 * 512]
    assert _places(records, "step")(np.array([15.0])).tolist() == [15.0]


@pytest.mark.parametrize(
    ("content", "line"),
    [(None, "no such file"), ("", "no records yet"), ('{"a": 1}', "no records yet")],
)
def test_curves_when_there_is_nothing_to_draw_say_so(tmp_path: Path, content: str | None, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=line):
        draw_curves({"run": path}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_curves_when_tokens_were_not_counted_name_the_flag(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    with pytest.raises(UserError, match="leave out --x tokens"):
        draw_curves({"run": tmp_path / "m.jsonl"}, tmp_path / "c.png", x="tokens")


def test_curves_when_matplotlib_is_missing_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_import = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return whole_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(UserError, match=r"pip install llm-trainers\[plot\]"):
        draw_curves({"run": write_metrics(tmp_path / "m.jsonl")}, tmp_path / "c.png")
