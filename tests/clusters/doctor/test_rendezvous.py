"""Hosts that meet at a store, and those that wait for one that never comes."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from llm.clusters.doctor.rendezvous import Rendezvous, is_here
from llm.config.errors import UserError


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def test_meeting_when_both_are_there_then_each_hears_what_the_other_says() -> None:
    first = Rendezvous("localhost", 0, is_first=True, seconds=10)
    other = Rendezvous("localhost", first.port, is_first=False, seconds=10)
    other.say("facts/1", {"name": "n2"})
    assert first.await_all(["facts/1"], 10) == []
    assert first.heard("facts/1") == {"name": "n2"}
    assert (first.count("arrived"), other.count("arrived"), first.count("arrived")) == (0, 1, 2)


def test_meeting_when_nobody_speaks_then_waits_no_longer_than_was_said() -> None:
    first = Rendezvous("localhost", 0, is_first=True, seconds=10)
    first.say("facts/1", 1)
    began = time.monotonic()
    assert first.await_all(["facts/1", "facts/2"], 0.3) == ["facts/2"]
    assert not first.await_any(["facts/2", "facts/3"], 0.3)
    assert first.await_any(["facts/2", "facts/1"], 0.3)
    assert first.answer("facts/2", 0.3) is None
    assert 0.9 <= time.monotonic() - began < 5


def test_meeting_when_the_first_host_comes_later_then_is_waited_for() -> None:
    port = free_port()
    opened: list[Rendezvous] = []
    late = threading.Timer(1.0, lambda: opened.append(Rendezvous("localhost", port, is_first=True, seconds=10)))
    late.start()
    Rendezvous("localhost", port, is_first=False, seconds=20).say("here", True)
    late.join()
    assert opened[0].heard("here") is True


def test_meeting_when_the_first_host_never_comes_then_the_line_says_what_was_waited_for() -> None:
    port = free_port()
    with pytest.raises(UserError, match=rf"waited 1 s for localhost:{port} .*start the doctor there too"):
        Rendezvous("localhost", port, is_first=False, seconds=1)


def test_meeting_when_the_port_is_taken_then_the_line_says_so() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken on localhost"):
            Rendezvous("localhost", port, is_first=True, seconds=5)


def test_address_when_it_is_this_host_then_is_here() -> None:
    assert is_here("localhost")
    assert not is_here("192.0.2.1")  # of the documents' own network, which nobody has
    with pytest.raises(UserError, match=r"knows no host no-such-host\.invalid"):
        is_here("no-such-host.invalid")
