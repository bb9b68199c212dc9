"""The C library's memory, where the tensors of a CPU live: kept from update to update."""

from __future__ import annotations

import ctypes
import platform

# Of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER, _NOWHERE = -1, 0
# Where glibc's own adjusting ends, as in a process that has freed large tensors, and its number of mappings.
_LARGEST_THRESHOLD, _DEFAULT_MMAP_MAX = 32 * 2**20, 65_536


def keep_freed_memory() -> None:
    """Freed memory stays with the process for what is allocated next, until `return_freed_memory`.

    glibc gives blocks of more than 32 MiB back to the system at once, and takes new ones for the next update, which the
    system fills with zeros page by page. With that an update of 6 x 384 in bf16 took 1.08 times as long on a virtual
    machine (benchmarks/results/throughput_6x384_memory.json), and 1.6 times while its host had no pages for it yet.
    Nothing happens where the C library is another one.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_MMAP_MAX, _NOWHERE)
        library.mallopt(_TRIM_THRESHOLD, _NEVER)


def return_freed_memory() -> None:
    """The system gets what is free, now and from now on."""
    if (library := _glibc()) is not None:
        library.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
