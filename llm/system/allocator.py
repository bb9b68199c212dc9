"""The C library's memory, where the tensors of a CPU live: kept from update to update."""

from __future__ import annotations

import ctypes
import os
import platform

# Of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER, _NOWHERE = -1, 0
# Where glibc's own adjusting ends, as in a process that has freed large tensors, and its number of mappings.
_LARGEST_THRESHOLD, _DEFAULT_MMAP_MAX = 32 * 2**20, 65_536

_kept_by: ctypes.CDLL | None = None


def keep_freed_memory() -> None:
    """Freed memory stays with the process for what is allocated next, until `return_freed_memory`.

    glibc gives blocks of more than 32 MiB back to the system at once, and takes new ones for the next update, which the
    system fills with zeros page by page. With that an update of 6 x 384 in bf16 took 1.08 times as long on a virtual
    machine (benchmarks/results/throughput_6x384_memory.json). It is the main thread's memory, where a CPU's updates are
    made. Nothing happens where the C library is another one, or its user has told it what to do.
    """
    global _kept_by
    _kept_by = _glibc()
    if _kept_by is not None:
        _kept_by.mallopt(_MMAP_MAX, _NOWHERE)
        _kept_by.mallopt(_TRIM_THRESHOLD, _NEVER)


def return_freed_memory() -> None:
    """What `keep_freed_memory` kept and is free now is the system's again, and large blocks are mapped by themselves.

    Not all is as before: glibc no longer adjusts its thresholds, which stay where it would have moved them, and holes
    between what still lives are filled again before anything is mapped.
    """
    global _kept_by
    if _kept_by is not None:
        _kept_by.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        _kept_by.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        _kept_by.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        _kept_by.malloc_trim(0)
    _kept_by = None


def _glibc() -> ctypes.CDLL | None:
    is_told = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" and not is_told else None
