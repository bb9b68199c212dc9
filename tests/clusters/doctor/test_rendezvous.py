"""The store over which hosts exchange values, and what happens if one never comes."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from llm.clusters.doctor.rendezvous import Rendezvous
from llm.config.errors import UserError


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def test_rendezvous_when_both_hosts_connect_then_share_values_and_counters() -> None:
    first = Rendezvous("localhost", 0, is_first=True, seconds=10)
    other = Rendezvous("localhost", first.port, is_first=False, seconds=10)
    other.set("facts/1", {"name": "n2"})
    assert first.wait_all(["facts/1"], 10) == []
    assert first.get("facts/1") == {"name": "n2"}
    assert (first.next_number("arrived"), other.next_number("arrived"), first.next_number("arrived")) == (0, 1, 2)


def test_rendezvous_when_a_value_is_missing_then_waits_no_longer_than_the_limit() -> None:
    first = Rendezvous("localhost", 0, is_first=True, seconds=10)
    first.set("facts/1", 1)
    began = time.monotonic()
    assert first.wait_all(["facts/1", "facts/2"], 0.3) == ["facts/2"]
    assert not first.wait_any(["facts/2", "facts/3"], 0.3)
    assert first.wait_any(["facts/2", "facts/1"], 0.3)
    assert first.wait_text("facts/2", 0.3) is None
    assert 0.9 <= time.monotonic() - began < 5


def test_rendezvous_when_the_first_host_comes_later_then_the_other_waits() -> None:
    port = free_port()
    opened: list[Rendezvous] = []
    late = threading.Timer(1.0, lambda: opened.append(Rendezvous("localhost", port, is_first=True, seconds=10)))
    late.start()
    Rendezvous("localhost", port, is_first=False, seconds=20).set("here", True)
    late.join()
    assert opened[0].get("here") is True


def test_rendezvous_when_the_first_host_never_comes_then_the_error_names_its_address() -> None:
    port = free_port()
    with pytest.raises(UserError, match=rf"waited 1 s for localhost:{port} .*start the doctor there too"):
        Rendezvous("localhost", port, is_first=False, seconds=1)


def test_rendezvous_when_the_port_is_in_use_then_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use on localhost"):
            Rendezvous("localhost", port, is_first=True, seconds=5)
