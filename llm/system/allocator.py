"""The heap of the C library, which holds tensors on the CPU: keep freed memory for the next step."""

from __future__ import annotations

import ctypes
import os
import platform

# Parameters of mallopt. Source: glibc's <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_NEVER_TRIM = -1
_NO_MAPPINGS = 0
# glibc raises its mmap threshold up to this value in a process that frees large blocks; it trims at twice the value.
_LARGEST_THRESHOLD = 32 * 2**20
_DEFAULT_MMAP_MAX = 65_536

_libc: ctypes.CDLL | None = None  # set while freed memory is kept


def keep_freed_memory() -> None:
    """Keep freed memory in the process, for later allocations, until `return_freed_memory` is called.

    By default glibc returns blocks of more than 32 MiB to the system as soon as they are freed, and maps new ones for
    the next step, which the system fills with zeros page by page. This made a step of the 6 x 384 model in bf16 take
    1.08 times as long on a virtual machine (benchmarks/results/throughput_6x384_memory.json).

    The setting applies to the memory of the main thread, in which a CPU run makes its steps. The function does nothing
    if the C library is not glibc, or if the user configures malloc by environment variables.
    """
    global _libc
    _libc = _configurable_glibc()
    if _libc is not None:
        _libc.mallopt(_M_MMAP_MAX, _NO_MAPPINGS)
        _libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)


def return_freed_memory() -> None:
    """Return the memory that `keep_freed_memory` kept and that is free now, and map large blocks separately again.

    Two differences from a fresh process remain: glibc no longer adjusts its thresholds, which stay at the values to
    which it would have raised them; and it fills free holes between live blocks before it maps new memory.
    """
    global _libc
    if _libc is not None:
        _libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        _libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        _libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        _libc.malloc_trim(0)
    _libc = None


def _configurable_glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc and the user has not configured its malloc."""
    is_configured = any(name.startswith("MALLOC_") for name in os.environ)
    is_configured = is_configured or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if is_configured or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)
