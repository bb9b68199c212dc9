"""Saving behind the training: what is written is what was there, and what goes wrong is heard."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.config.errors import UserError
from llm.config.options import OutputOptions
from llm.training.checkpoints.async_saver import AsyncSaver, HostBuffers
from llm.training.checkpoints.store import NotFiniteError


def saver(folder: Path, **options: Any) -> AsyncSaver:
    options = {"save_minutes": 0} | options
    output = OutputOptions(output_dir=str(folder), **options)
    return AsyncSaver(output, request_file=folder / "SAVE", checkpoints=folder / "checkpoints")


class Written:
    """A stand-in for the files: remembers what it was given; may wait, or fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.got: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
        self.may_go_on = threading.Event()
        self.error = error
        self.threads: list[str] = []

    def __call__(self, *, weights: Any, tensors: Any) -> Path:
        assert self.may_go_on.wait(20)
        self.threads.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        self.got.append(tuple({name: t.clone() for name, t in part.items()} for part in (weights, tensors)))  # type: ignore[arg-type]
        return Path()


def test_save_when_the_training_goes_on_meanwhile_then_what_was_there_is_written(tmp_path: Path) -> None:
    write, one = Written(), saver(tmp_path)
    weight, moment = torch.ones(3, 2), torch.zeros(3, 2)
    one.save(10, {"a": weight}.items(), {"a/exp_avg": moment}, write, ["regular"])
    weight += 1
    moment += 1
    write.may_go_on.set()
    one.wait()
    ((weights, tensors),) = write.got
    assert torch.equal(weights["a"], torch.ones(3, 2))
    assert torch.equal(tensors["a/exp_avg"], torch.zeros(3, 2))
    assert write.threads == ["save"]
    assert one.step == 10


def test_save_when_the_former_is_still_written_then_waits_for_it_and_uses_its_memory(tmp_path: Path) -> None:
    write, one = Written(), saver(tmp_path)
    weight = torch.ones(2)
    one.save(10, {"a": weight}.items(), {}, write, ["regular"])
    threading.Timer(0.3, write.may_go_on.set).start()
    weight += 1
    one.save(20, {"a": weight}.items(), {}, write, ["regular"])
    one.wait()
    assert [float(weights["a"][0]) for weights, _ in write.got] == [1.0, 2.0]
    assert one.stall_seconds[0] < 0.2 < one.stall_seconds[1]


def test_memory_when_copied_again_then_no_new_memory_is_taken_and_views_are_kept() -> None:
    memory = HostBuffers()
    table = torch.arange(12.0).reshape(3, 4)
    given = {"table": table, "turned": table.t(), "empty": torch.zeros(0), "number": torch.tensor(3.0)}
    first = memory.copy(given.items())
    assert first["turned"].is_contiguous()
    assert all(torch.equal(first[name], tensor) for name, tensor in given.items())
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    table += 1
    second = memory.copy(given.items())
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == places
    assert torch.equal(second["turned"], table.t())
    assert torch.equal(memory.copy([("table", torch.zeros(5))])["table"], torch.zeros(5))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("checkpoint step_10 cannot be written (No space left); make room"), "No space left"),
        (ValueError("odd"), r"step 10 was not written \(ValueError: odd\)"),
    ],
)
def test_save_when_it_fails_then_the_next_update_hears_of_it(tmp_path: Path, error: Exception, said: str) -> None:
    write, one = Written(error), saver(tmp_path)
    write.may_go_on.set()
    one.save(10, {"a": torch.ones(2)}.items(), {}, write, ["regular"])
    one.close()
    with pytest.raises(UserError, match=said):
        one.check()
    with pytest.raises(UserError, match=said):
        one.wait()


def test_save_when_the_weights_are_not_finite_then_the_run_goes_on_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    write, one = Written(NotFiniteError("step 10 is not saved: a is not finite")), saver(tmp_path)
    write.may_go_on.set()
    one.save(10, {"a": torch.ones(2)}.items(), {}, write, ["regular"])
    one.wait()
    assert one.requests() == []
    assert [record.getMessage() for record in caplog.records] == ["step 10 is not saved: a is not finite"]
    assert one.skipped_because is write.error
    write.error = None
    one.save(20, {"a": torch.ones(2)}.items(), {}, write, ["regular"])
    one.wait()
    assert one.skipped_because is None


def test_reasons_when_the_clock_says_so_then_timed_until_something_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    one, write = saver(tmp_path, save_minutes=2), Written()
    write.may_go_on.set()
    now += 119
    assert one.requests() == []
    now += 1
    assert one.requests() == ["timed"]
    one.save(10, {}.items(), {}, write, ["regular", "timed"])
    one.wait()
    now += 119
    assert one.requests() == []
    now += 1
    assert one.requests() == ["timed"]


def test_saves_when_they_cost_more_than_they_may_then_become_rarer_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    caplog.set_level(logging.INFO, "llm")
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    one, write = saver(tmp_path, save_minutes=1), Written()
    one.save(1, {}.items(), {}, write, ["timed"])

    def wait_for_the_former() -> None:
        nonlocal now
        now += 3.0
        write.may_go_on.set()

    monkeypatch.setattr(one, "wait", wait_for_the_former)
    one.save(2, {}.items(), {}, write, ["timed"])
    one.close()
    assert "saving takes 3.0 s: from now on every 2.5 minutes" in caplog.text
    now += 149
    assert one.requests() == []
    now += 2
    assert one.requests() == ["timed"]


def test_reasons_when_a_file_asks_for_it_then_saves_once_and_the_file_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    one, write = saver(tmp_path), Written()
    write.may_go_on.set()
    (tmp_path / "SAVE").touch()
    now += 10
    assert one.requests() == ["asked"]
    one.save(3, {}.items(), {}, write, ["asked"])
    one.wait()
    assert not (tmp_path / "SAVE").exists()
    now += 10
    assert one.requests() == []


def test_save_when_an_older_one_cannot_be_removed_then_says_so_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        # As a network disk does while another program reads a file in it.
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    monkeypatch.setattr("llm.training.checkpoints.async_saver.superseded", lambda *_: [tmp_path / "step_1"])
    monkeypatch.setattr("llm.training.checkpoints.async_saver.remove", refuse)
    write, one = Written(), saver(tmp_path)
    write.may_go_on.set()
    one.save(10, {"a": torch.ones(2)}.items(), {}, write, ["regular"])
    one.wait()
    assert one.requests() == []
    assert f"{tmp_path / 'step_1'} cannot be removed (Directory not empty)" in caplog.text
