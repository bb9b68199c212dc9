"""Names of hosts, Slurm's host lists, and which host is this one."""

from __future__ import annotations

import socket

import pytest

from llm.clusters.hostlist import expand_hostlist, host_index, is_local_host, unique_hosts


def test_unique_hosts_when_names_repeat_then_keep_each_once_in_order() -> None:
    assert unique_hosts(["b", "b", "a", "b", "a"]) == ("b", "a")


def test_unique_hosts_when_a_name_comes_with_and_without_domain_then_count_it_once() -> None:
    assert unique_hosts(["x1.hsn.cluster", "x1", "X1.hsn.cluster", "x10"]) == ("x1.hsn.cluster", "x10")
    assert unique_hosts(["10.0.0.1", "10.0.0.10", "fe80::1", "fe80::12"]) == (
        "10.0.0.1",
        "10.0.0.10",
        "fe80::1",
        "fe80::12",
    )


def test_host_index_when_the_list_has_another_domain_then_still_matches() -> None:
    hosts = ["x1.hsn.cluster", "x10.hsn.cluster"]
    assert host_index("x10", hosts) == 1
    assert host_index("x1.login.cluster", hosts) == 0
    assert host_index("x2", hosts) is None
    assert host_index("x1", ["x1.left", "x1.right"]) is None  # two of that name


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("nid[001008-001010,7]", ["nid001008", "nid001009", "nid001010", "nid7"]),
        ("a[1-2]-ib,b", ["a1-ib", "a2-ib", "b"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("n[09-11]", ["n09", "n10", "n11"]),
    ],
)
def test_hostlist_when_compressed_then_is_expanded(text: str, names: list[str]) -> None:
    assert list(expand_hostlist(text)) == names


@pytest.mark.parametrize("text", ["", "n[1-", "n[a-b]", "n[]", "a b"])
def test_hostlist_when_malformed_then_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no list"):
        expand_hostlist(text)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", socket.gethostname(), f"{socket.gethostname()}.fast.net"])
def test_local_host_when_the_name_or_address_is_this_hosts_then_is_local(host: str) -> None:
    assert is_local_host(host)


def test_local_host_when_the_address_is_another_hosts_then_is_not_local() -> None:
    assert not is_local_host("192.0.2.1")  # reserved for documentation (RFC 5737)


def test_local_host_when_only_its_second_address_is_bound_here_then_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = socket.SOCK_STREAM
    addresses = [
        (socket.AF_INET, kind, 0, "", ("192.0.2.1", 0)),
        (socket.AF_INET, kind, 0, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    assert is_local_host("two-networks")


def test_local_host_when_the_name_cannot_be_resolved_then_raises() -> None:
    with pytest.raises(socket.gaierror):
        is_local_host("no-such-host.invalid")
