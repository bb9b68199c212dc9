"""Asynchronous saves: the copies are those of the moment of the save, and failures reach the training."""

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


class FakeWrite:
    """Stands for the writing of a checkpoint: keeps copies of its arguments, waits until it may finish, may fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.written: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
        self.may_finish = threading.Event()
        self.error = error
        self.threads: list[str] = []

    def __call__(self, *, weights: Any, tensors: Any) -> Path:
        assert self.may_finish.wait(20)
        self.threads.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        self.written.append(tuple({name: t.clone() for name, t in part.items()} for part in (weights, tensors)))  # type: ignore[arg-type]
        return Path()


def test_save_when_the_weights_change_meanwhile_then_their_values_at_the_save_are_written(tmp_path: Path) -> None:
    write, one = FakeWrite(), saver(tmp_path)
    weight, moment = torch.ones(3, 2), torch.zeros(3, 2)
    one.save(10, {"a": weight}.items(), {"a/exp_avg": moment}, write, ["regular"])
    weight += 1
    moment += 1
    write.may_finish.set()
    one.wait()
    ((weights, tensors),) = write.written
    assert torch.equal(weights["a"], torch.ones(3, 2))
    assert torch.equal(tensors["a/exp_avg"], torch.zeros(3, 2))
    assert write.threads == ["save"]
    assert one.step == 10


def test_save_when_the_save_before_is_not_finished_then_waits_for_it_and_reuses_its_buffers(tmp_path: Path) -> None:
    write, one = FakeWrite(), saver(tmp_path)
    weight = torch.ones(2)
    one.save(10, {"a": weight}.items(), {}, write, ["regular"])
    threading.Timer(0.3, write.may_finish.set).start()
    weight += 1
    one.save(20, {"a": weight}.items(), {}, write, ["regular"])
    one.wait()
    assert [float(weights["a"][0]) for weights, _ in write.written] == [1.0, 2.0]
    assert one.stall_seconds[0] < 0.2 < one.stall_seconds[1]


def test_buffers_when_tensors_are_copied_again_then_no_memory_is_allocated() -> None:
    buffers = HostBuffers()
    table = torch.arange(12.0).reshape(3, 4)
    tensors = {"table": table, "transposed": table.t(), "empty": torch.zeros(0), "number": torch.tensor(3.0)}
    first = buffers.copy(tensors.items())
    assert first["transposed"].is_contiguous()
    assert all(torch.equal(first[name], tensor) for name, tensor in tensors.items())
    addresses = {name: tensor.data_ptr() for name, tensor in first.items()}
    table += 1
    second = buffers.copy(tensors.items())
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == addresses
    assert torch.equal(second["transposed"], table.t())
    assert torch.equal(buffers.copy([("table", torch.zeros(5))])["table"], torch.zeros(5))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("checkpoint step_10 cannot be written (No space left); make room"), "No space left"),
        (ValueError("odd"), r"step 10 was not written \(ValueError: odd\)"),
    ],
)
def test_save_when_it_fails_then_the_next_check_and_wait_raise(tmp_path: Path, error: Exception, message: str) -> None:
    write, one = FakeWrite(error), saver(tmp_path)
    write.may_finish.set()
    one.save(10, {"a": torch.ones(2)}.items(), {}, write, ["regular"])
    one.close()
    with pytest.raises(UserError, match=message):
        one.check()
    with pytest.raises(UserError, match=message):
        one.wait()


def test_save_when_the_weights_are_not_finite_then_is_skipped_and_the_run_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    write, one = FakeWrite(NotFiniteError("step 10 is not saved: a is not finite")), saver(tmp_path)
    write.may_finish.set()
    one.save(10, {"a": torch.ones(2)}.items(), {}, write, ["regular"])
    one.wait()
    assert one.requests() == []
    assert [record.getMessage() for record in caplog.records] == ["step 10 is not saved: a is not finite"]
    assert one.skipped_because is write.error
    write.error = None
    one.save(20, {"a": torch.ones(2)}.items(), {}, write, ["regular"])
    one.wait()
    assert one.skipped_because is None


def test_requests_when_the_interval_has_passed_then_are_timed_until_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    one, write = saver(tmp_path, save_minutes=2), FakeWrite()
    write.may_finish.set()
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


def test_interval_when_saves_cost_too_much_time_then_is_lengthened_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    caplog.set_level(logging.INFO, "llm")
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    one, write = saver(tmp_path, save_minutes=1), FakeWrite()
    one.save(1, {}.items(), {}, write, ["timed"])

    def wait_for_the_save_before() -> None:
        nonlocal now
        now += 3.0
        write.may_finish.set()

    monkeypatch.setattr(one, "wait", wait_for_the_save_before)
    one.save(2, {}.items(), {}, write, ["timed"])
    one.close()
    assert "saving takes 3.0 s: from now on every 2.5 minutes" in caplog.text
    now += 149
    assert one.requests() == []
    now += 2
    assert one.requests() == ["timed"]


def test_requests_when_the_file_save_exists_then_one_save_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    one, write = saver(tmp_path), FakeWrite()
    write.may_finish.set()
    (tmp_path / "SAVE").touch()
    now += 10
    assert one.requests() == ["asked"]
    one.save(3, {}.items(), {}, write, ["asked"])
    one.wait()
    assert not (tmp_path / "SAVE").exists()
    now += 10
    assert one.requests() == []


def test_save_when_an_older_checkpoint_cannot_be_removed_then_warns_and_the_run_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        # As a network disk does while another program reads a file in it.
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    monkeypatch.setattr("llm.training.checkpoints.async_saver.superseded", lambda *_: [tmp_path / "step_1"])
    monkeypatch.setattr("llm.training.checkpoints.async_saver.remove", refuse)
    write, one = FakeWrite(), saver(tmp_path)
    write.may_finish.set()
    one.save(10, {"a": torch.ones(2)}.items(), {}, write, ["regular"])
    one.wait()
    assert one.requests() == []
    assert f"{tmp_path / 'step_1'} cannot be removed (Directory not empty)" in caplog.text
