"""Every schedule against its closed form, which is written out here."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from llm.config.errors import UsageError
from llm.config.options import ScheduleOptions
from llm.optim.schedules import build_schedule

N, W, PEAK = 100, 10, 2e-3


def _build(name: str, num_steps: int = N, warmup: int = W, ratio: float | None = None, **kwargs):
    options = ScheduleOptions(
        lr_scheduler_type=name,
        num_warmup_steps=warmup,
        min_lr_ratio=ratio,
        lr_scheduler_kwargs=kwargs,
    )
    return build_schedule(options, num_steps, learning_rate=PEAK)


def _half_cosine(share: float, floor: float = 0.0) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2


def _share(k: int) -> float:
    return (k - W) / (N - W)


AFTER_WARMUP: dict[str, tuple[dict[str, object], Callable[[int], float], float]] = {
    "linear": ({}, lambda k: (N - k) / (N - W), 0.0),
    "cosine": ({}, lambda k: _half_cosine(_share(k)), 0.0),
    "cosine_with_restarts": (
        {"num_cycles": 3},
        lambda k: _half_cosine(math.fmod(3 * _share(k), 1.0)),
        0.0,
    ),
    "polynomial": (
        {"lr_end": 2e-4, "power": 2.0},
        lambda k: 0.9 * (1 - _share(k)) ** 2 + 0.1,
        0.1,
    ),
    "constant_with_warmup": ({}, lambda k: 1.0, 1.0),
    "inverse_sqrt": ({}, lambda k: math.sqrt(W / k), math.sqrt(0.1)),
    "cosine_with_min_lr": ({"min_lr": 5e-4}, lambda k: _half_cosine(_share(k), 0.25), 0.25),
    "warmup_stable_decay": (
        {"num_decay_steps": 20, "decay_type": "linear", "min_lr_ratio": 0.1},
        lambda k: 1.0 if k < 80 else 1 - 0.9 * (k - 80) / 20,
        0.1,
    ),
}


@pytest.mark.parametrize("name", AFTER_WARMUP)
def test_schedule_when_of_any_type_then_is_its_closed_form_to_the_end(name: str) -> None:
    kwargs, closed, end = AFTER_WARMUP[name]
    factor = _build(name, **kwargs)
    start = kwargs.get("min_lr_ratio", 0.0)
    for k in range(W):
        assert factor(k) == pytest.approx(start + (1 - start) * k / W)
    for k in range(W, N):
        assert factor(k) == pytest.approx(closed(k), abs=1e-12)
    assert factor(N) == pytest.approx(end, abs=1e-12)


def test_schedule_when_constant_then_is_one() -> None:
    factor = _build("constant", warmup=0)
    assert [factor(k) for k in (0, 50, N)] == [1.0, 1.0, 1.0]


def test_schedule_when_cosine_warmup_with_min_lr_then_is_its_closed_form() -> None:
    # HF counts from one here: no step has the rate 0, and the last step has the floor.
    factor = _build("cosine_warmup_with_min_lr", min_lr_rate=0.2)
    assert [factor(k) for k in range(W)] == pytest.approx([(k + 1) / W for k in range(W)])
    for k in range(W, N):
        assert factor(k) == pytest.approx(_half_cosine((k - W + 1) / (N - W), 0.2))
    assert factor(N - 1) == pytest.approx(0.2)


def test_schedule_when_cosine_has_min_lr_ratio_then_ends_at_the_floor() -> None:
    factor = _build("cosine", ratio=0.1)
    assert factor(N) == pytest.approx(0.1)
    assert factor(55) == pytest.approx(_half_cosine(0.5, 0.1))


def test_schedule_when_steps_are_read_out_of_order_then_is_the_same() -> None:
    factor = _build("cosine_with_restarts", num_cycles=2)
    backwards = [factor(k) for k in reversed(range(N))]
    assert backwards[::-1] == [factor(k) for k in range(N)]


def test_schedule_when_an_argument_is_unknown_then_names_the_allowed_ones() -> None:
    with pytest.raises(UsageError, match=r"cycles: not an argument of cosine; .*takes num_cycles"):
        _build("cosine", cycles=2)
    with pytest.raises(UsageError, match="takes nothing here"):
        _build("linear", num_cycles=2)


@pytest.mark.parametrize(
    ("name", "kwargs", "cause"),
    [
        ("warmup_stable_decay", {}, "missing 1 required positional argument: 'num_decay_steps'"),
        ("cosine_with_min_lr", {}, "min_lr or min_lr_rate"),
        ("polynomial", {"lr_end": 1.0}, "must be smaller"),
        ("cosine", {"num_cycles": "two"}, "--lr_scheduler_type cosine: "),
        ("inverse_sqrt", {"timescale": 0}, "--lr_scheduler_type inverse_sqrt: "),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 5, "decay_type": "steep"},
            "Unknown decay type: steep",
        ),
    ],
)
def test_schedule_when_an_argument_is_invalid_then_the_error_is_one_line(
    name: str, kwargs: dict[str, object], cause: str
) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        _build(name, **kwargs)
    assert "\n" not in str(caught.value)


def test_schedule_when_warmup_is_longer_than_the_run_then_warns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    factor = _build("linear", num_steps=5, warmup=10)
    assert factor(4) == pytest.approx(0.4)
    assert "never reaches its peak" in caplog.text
