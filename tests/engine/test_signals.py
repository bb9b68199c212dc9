"""The first signal asks for a stop, the second one stops."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from llm.engine.signals import SIGNALS, listening


@pytest.fixture(autouse=True)
def caught() -> Iterator[list[int]]:
    """Handlers of the test's own stand before, so that nothing kills the test; the signals they got."""
    got: list[int] = []

    def catch(number: int, _: FrameType | None) -> None:
        got.append(number)

    previous = {number: signal.signal(number, catch) for number in SIGNALS}
    yield got
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_when_the_first_then_is_noted_with_its_name(number: int, caught: list[int]) -> None:
    with listening() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.reason == signal.Signals(number).name
    assert caught == []


def test_signal_when_the_second_then_does_what_it_always_did(caught: list[int]) -> None:
    with listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    assert caught == [signal.SIGINT, signal.SIGTERM]


def test_handlers_when_the_block_ends_or_fails_then_are_the_old_ones(caught: list[int]) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with listening():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(ZeroDivisionError), listening():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before
    os.kill(os.getpid(), signal.SIGUSR1)
    assert caught == [signal.SIGUSR1]
