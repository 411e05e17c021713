"""Keeping freed memory in processes that read blocks without end.

A block of cells needs some hundred megabytes for moments. The C library gives them back to the
system at once and the system clears them page by page when they are asked for again, which costs as
much time as reading the counts. A process that does nothing but read keeps them instead; its size
stays what its largest block needed.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# numbers of mallopt(3)
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_ARENA_MAX = -8
_LARGEST_THRESHOLD_BYTES = 32 << 20  # glibc takes no more
_NEVER_TRIM_BYTES = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let this process reuse freed memory without asking the system; call it early.

    Returns:
        Whether the C library took the settings (glibc does; elsewhere nothing changes).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = (
        (_ARENA_MAX, 1),
        (_MMAP_THRESHOLD, _LARGEST_THRESHOLD_BYTES),
        (_TRIM_THRESHOLD, _NEVER_TRIM_BYTES),
    )
    return all(mallopt(ctypes.c_int(which), ctypes.c_int(value)) == 1 for which, value in settings)
