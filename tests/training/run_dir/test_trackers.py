"""Records of a run: where they are written, and that a resumed run writes none twice."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import llm.training.run_dir.trackers as trackers
from llm.config.errors import UserError
from llm.config.options import HubOptions, Options, TrackingOptions, TrainingOptions
from llm.training.accelerator import start_compute
from llm.training.run_dir.folder import RunDirectory


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make TensorBoard, wandb (logged in) and trackio appear installed."""
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard", "wandb", "trackio"])
    monkeypatch.setattr(trackers, "_wandb_is_logged_in", lambda: True)


def chosen(report_to: str, *, with_tracking: bool = True) -> list[str]:
    return trackers.choose_trackers(TrackingOptions(with_tracking=with_tracking, report_to=report_to))


@pytest.mark.parametrize(
    ("report_to", "expected"),
    [
        ("wandb", ["tensorboard", "wandb"]),
        ("tensorboard", ["tensorboard"]),
        (" trackio , wandb,", ["tensorboard", "trackio", "wandb"]),
        ("wandb,wandb", ["tensorboard", "wandb"]),
        ("none", ["tensorboard"]),
        ("all", ["tensorboard", "trackio", "wandb"]),
        ("wandb,all", ["tensorboard", "wandb", "trackio"]),
    ],
)
@pytest.mark.usefixtures("installed")
def test_choose_trackers_when_named_then_are_these_with_tensorboard_first(report_to: str, expected: list[str]) -> None:
    assert chosen(report_to) == expected


@pytest.mark.usefixtures("installed")
def test_choose_trackers_when_tracking_is_off_then_only_tensorboard_and_names_are_not_checked() -> None:
    assert chosen("nonsense", with_tracking=False) == ["tensorboard"]


@pytest.mark.parametrize(("report_to", "fix"), [("wandbb", "choose all, .*wandb"), ("mlflow", "pip install mlflow")])
@pytest.mark.usefixtures("installed")
def test_choose_trackers_when_one_is_not_available_then_is_refused(report_to: str, fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        chosen(f"wandb,{report_to}")


@pytest.mark.usefixtures("installed")
def test_wandb_when_not_logged_in_then_is_refused_by_name_and_left_out_of_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    monkeypatch.setattr(trackers, "_wandb_is_logged_in", lambda: False)
    with pytest.raises(UserError, match="run wandb login"):
        chosen("wandb")
    assert chosen("all") == ["tensorboard", "trackio"]
    assert "wandb is installed but not logged in" in caplog.text


def test_wandb_when_the_environment_has_a_key_or_mode_then_counts_as_logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert trackers._wandb_is_logged_in()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert trackers._wandb_is_logged_in()


def opened(path: Path, first_step: int, options: Options | None = None) -> trackers.Tracking:
    compute = start_compute(TrainingOptions(use_cpu=True, mixed_precision="no"))
    tracking = trackers.Tracking(compute.accelerator, RunDirectory(path))
    tracking.start(["tensorboard"], options or Options(), first_step=first_step)
    return tracking


def test_records_when_written_then_are_lines_of_json_with_numbers_and_texts(tmp_path: Path) -> None:
    records = opened(tmp_path, 0)
    records.record(1, {"loss": 1.5, "num_skipped": 0})
    records.record(1, {"samples": ["a\nb", "é"]})
    records.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 1.5, "num_skipped": 0},
        {"step": 1, "samples": ["a\nb", "é"]},
    ]


def test_records_when_resumed_then_later_ones_and_the_cut_line_are_removed(tmp_path: Path) -> None:
    records = opened(tmp_path, 0)
    for step in range(1, 6):
        records.record(step, {"loss": float(step)})
    records.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # as after a kill
    records = opened(tmp_path, 3)
    records.record(4, {"loss": 40.0})
    records.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in lines] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_has_samples_when_resumed_then_is_true_for_steps_with_samples_up_to_the_first(tmp_path: Path) -> None:
    records = opened(tmp_path, 0)
    for step in (2, 4):
        records.record(step, {"loss": 1.0})
        records.record(step, {"samples": ["text"]})
    records.close()
    assert not records.has_samples(2)  # only samples of earlier starts count
    records = opened(tmp_path, 3)
    records.close()
    assert [records.has_samples(step) for step in (1, 2, 4)] == [False, True, False]


@pytest.mark.parametrize("broken", ["metrics", "tracker"])
def test_record_when_it_cannot_be_written_then_the_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    records = opened(tmp_path, 0)
    if broken == "metrics":
        monkeypatch.setattr(trackers.json, "dumps", full)
    else:
        monkeypatch.setattr(records.accelerator.trackers[0], "log", full)
    monkeypatch.setattr(records.accelerator.trackers[0], "finish", full)
    with pytest.raises(
        UserError, match=r"records of step 7 cannot be written into .*No space left.*make room"
    ) as error:
        records.record(7, {"loss": 1.0})
    assert "\n" not in str(error.value)
    records.close()  # a failure to close is not raised


def test_tensorboard_when_resumed_then_shows_each_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, value in ((0, 1.0), (2, 2.0)):
        records = opened(tmp_path, first_step)
        for step in range(first_step + 1, 5):
            records.record(step, {"loss": value})
        records.close()
    assert (tmp_path / "tensorboard").is_dir()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_tracking_when_there_is_no_folder_then_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracking = trackers.Tracking(start_compute(TrainingOptions(use_cpu=True, mixed_precision="no")).accelerator, None)
    tracking.start(["tensorboard"], Options(), first_step=0)
    tracking.record(1, {"loss": 1.0})
    tracking.close()
    assert list(tmp_path.iterdir()) == []


def test_flatten_options_when_there_is_a_secret_then_is_left_out() -> None:
    flat: dict[str, Any] = trackers._flatten_options(
        Options(hub=HubOptions(hub_token="hf_secret", hub_model_id="me/gpt"))
    )
    assert flat["learning_rate"] == 5e-5
    assert flat["hub_model_id"] == "me/gpt"
    assert "hf_secret" not in str(flat)
    assert all(isinstance(value, (bool, int, float, str)) for value in flat.values())


def test_tracker_when_it_does_not_start_then_the_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = start_compute(TrainingOptions(use_cpu=True, mixed_precision="no"))

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no server\nand a long story")

    monkeypatch.setattr(compute.accelerator, "init_trackers", refuse)
    with pytest.raises(UserError, match=r"tensorboard, wandb does not start: no server$"):
        trackers.Tracking(compute.accelerator, RunDirectory(tmp_path)).start(
            ["tensorboard", "wandb"], Options(), first_step=0
        )


def test_records_when_a_number_is_not_finite_then_are_valid_json(tmp_path: Path) -> None:
    records = opened(tmp_path, 0)
    records.record(1, {"loss": None, "grad_norm": float("nan"), "lr": 1e-3})
    records.close()

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON: jq, JavaScript and pandas reject it")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": None, "grad_norm": None, "lr": 1e-3}


def test_wandb_when_a_run_is_resumed_then_has_the_same_id_and_no_record_is_sent_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="an extra that the tests do not install")

    sent: dict[str, list[int]] = {}

    class Run:
        """A stand-in for the server, which continues after its newest step, as W&B does."""

        def __init__(self, name: str) -> None:
            self.records = sent.setdefault(name, [])
            self.step = max(self.records, default=-1) + 1

        def log(self, values: dict[str, Any], step: int) -> None:
            assert step >= self.step
            self.records.append(step)

        def finish(self) -> None:
            pass

    def init(*, project: str, id: str, resume: str) -> Run:
        assert resume == "allow"
        return Run(id)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "config", {}, raising=False)
    monkeypatch.setattr("accelerate.tracking.WandBTracker.store_init_configuration", lambda *_: None)

    def started(first_step: int) -> trackers.Tracking:
        compute = start_compute(TrainingOptions(use_cpu=True, mixed_precision="no"))
        tracking = trackers.Tracking(compute.accelerator, RunDirectory(tmp_path))
        tracking.start(["tensorboard", "wandb"], Options(), first_step=first_step)
        return tracking

    for first_step, last_step in ((0, 5), (3, 8)):
        records = started(first_step)
        for step in range(first_step + 1, last_step + 1):
            records.record(step, {"loss": 1.0})
        records.close()
    assert list(sent.values()) == [[1, 2, 3, 4, 5, 6, 7, 8]]
    started(0).close()
    assert len(sent) == 2
