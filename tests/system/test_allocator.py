"""What was freed is allocated again without the system's help, and goes back to it in the end."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

# A process of its own: what else has been allocated in one decides where a tensor finds room.
_BEGINNING = """
import os, platform, resource, torch
from llm.system.allocator import keep_freed_memory, return_freed_memory
from llm.system.memory import resident_bytes

BYTES = 96 * 2**20  # more than any block that glibc would keep by itself

def faults(number):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(number):
        torch.ones(BYTES // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

"""


def run(script: str) -> None:
    found = subprocess.run([sys.executable, "-c", _BEGINNING + script], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr


def test_keep_when_a_large_tensor_was_freed_then_the_next_one_costs_no_pages() -> None:
    run("""
assert faults(5) > 5_000
keep_freed_memory()
faults(30)  # what is small is taken from the ends of what is large, until there is enough of it
assert faults(10) < 1_000, faults(10)
""")


def test_return_when_memory_was_kept_then_the_system_has_it_again() -> None:
    run("""
keep_freed_memory()
faults(30)
kept = resident_bytes()
return_freed_memory()
assert resident_bytes() < kept - 0.9 * BYTES, (kept, resident_bytes())
return_freed_memory()  # once more is nothing
""")


@pytest.mark.parametrize(
    "why", ["platform.libc_ver = lambda: ('', '')", "os.environ['MALLOC_TRIM_THRESHOLD_'] = '1000000'"]
)
def test_keep_when_the_library_is_another_one_or_was_told_what_to_do_then_does_nothing(why: str) -> None:
    run(f"""
{why}
keep_freed_memory()
assert min(faults(1) for _ in range(30)) > 1_000
return_freed_memory()
""")
