"""Freed memory is kept for later allocations, and returned to the system in the end."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

# Each test runs in a process of its own: earlier allocations decide where a tensor is placed.
_BEGINNING = """
import os, platform, resource, torch
from llm.system.allocator import keep_freed_memory, return_freed_memory
from llm.system.memory import resident_bytes

BYTES = 96 * 2**20  # more than any block that glibc keeps by default

def faults(number):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(number):
        torch.ones(BYTES // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

"""


def run(script: str) -> None:
    result = subprocess.run([sys.executable, "-c", _BEGINNING + script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_keep_freed_memory_when_a_large_tensor_was_freed_then_the_next_one_costs_no_page_faults() -> None:
    run("""
assert faults(5) > 5_000
keep_freed_memory()
faults(30)  # small blocks are first taken from the ends of large ones, until there are enough small ones
assert faults(10) < 1_000, faults(10)
""")


def test_return_freed_memory_when_memory_was_kept_then_the_resident_size_falls() -> None:
    run("""
keep_freed_memory()
faults(30)
kept = resident_bytes()
return_freed_memory()
assert resident_bytes() < kept - 0.9 * BYTES, (kept, resident_bytes())
return_freed_memory()  # a second call does nothing
""")


@pytest.mark.parametrize(
    "reason", ["platform.libc_ver = lambda: ('', '')", "os.environ['MALLOC_TRIM_THRESHOLD_'] = '1000000'"]
)
def test_keep_freed_memory_when_libc_is_another_one_or_the_user_configures_it_then_does_nothing(reason: str) -> None:
    run(f"""
{reason}
keep_freed_memory()
assert min(faults(1) for _ in range(30)) > 1_000
return_freed_memory()
""")
