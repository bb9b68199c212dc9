"""What was freed is allocated again without the system's help, and goes back to it in the end."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator

import pytest
import torch

from llm.world.malloc import keep_freed_memory, return_freed_memory
from llm.world.memory import resident_bytes

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

# Larger than any block that glibc would keep by itself.
_BYTES = 96 * 2**20


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    return_freed_memory()  # an earlier test may have started a machine
    yield
    return_freed_memory()


def faults_of_a_tensor() -> int:
    """Pages that the system hands out for one, which is gone afterwards."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(_BYTES // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_keep_when_a_large_tensor_was_freed_then_the_next_one_costs_no_pages() -> None:
    assert [faults_of_a_tensor() > 1_000 for _ in range(3)] == [True] * 3
    keep_freed_memory()
    # What is small is taken from the ends of what is large, until there is enough of it.
    for _ in range(30):
        faults_of_a_tensor()
    assert sum(faults_of_a_tensor() for _ in range(10)) < 1_000


def test_return_when_memory_was_kept_then_the_system_has_it_again() -> None:
    keep_freed_memory()
    faults_of_a_tensor()
    kept = resident_bytes()
    return_freed_memory()
    assert resident_bytes() < kept - 0.9 * _BYTES
    for _ in range(30):
        faults_of_a_tensor()
    assert resident_bytes() < kept - 0.9 * _BYTES


@pytest.mark.parametrize("reason", ["library", "user"])
def test_keep_when_the_library_is_another_one_or_was_told_what_to_do_then_does_nothing(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "library":
        monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    else:
        monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    keep_freed_memory()
    assert all(faults_of_a_tensor() > 1_000 for _ in range(30))
