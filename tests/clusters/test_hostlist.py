"""Names of hosts."""

from __future__ import annotations

import pytest

from llm.clusters.hostlist import expand, index_of, unique_hosts


def test_hosts_when_repeated_then_are_kept_once_in_order() -> None:
    assert unique_hosts(["b", "b", "a", "b", "a"]) == ("b", "a")


def test_hosts_when_with_and_without_domain_then_are_one() -> None:
    assert unique_hosts(["x1.hsn.cluster", "x1", "X1.hsn.cluster", "x10"]) == ("x1.hsn.cluster", "x10")
    assert unique_hosts(["10.0.0.1", "10.0.0.10", "fe80::1", "fe80::12"]) == (
        "10.0.0.1",
        "10.0.0.10",
        "fe80::1",
        "fe80::12",
    )


def test_own_name_when_the_list_has_another_domain_then_is_found() -> None:
    hosts = ["x1.hsn.cluster", "x10.hsn.cluster"]
    assert index_of("x10", hosts) == 1
    assert index_of("x1.login.cluster", hosts) == 0
    assert index_of("x2", hosts) is None
    assert index_of("x1", ["x1.left", "x1.right"]) is None  # two of that name


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
def test_list_when_in_slurms_short_form_then_is_written_out(text: str, names: list[str]) -> None:
    assert list(expand(text)) == names


@pytest.mark.parametrize("text", ["", "n[1-", "n[a-b]", "n[]", "a b"])
def test_list_when_it_is_none_then_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no list"):
        expand(text)
