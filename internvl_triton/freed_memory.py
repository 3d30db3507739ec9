"""What a process does with memory that it has freed."""

import ctypes

__all__ = ["keep_freed_memory"]

# <malloc.h> of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more
_KEPT_BYTES = 256 * 2**20


def keep_freed_memory() -> None:
    """Keep freed memory for the next request instead of giving it back to the kernel.

    A picture's buffers are megabytes, and glibc returns such at once: the kernel then clears every
    page of them again for the next picture, which takes as long as resizing it. Kept are up to 256
    MB that are free at a heap's end; arrays of more than 32 MB are always given back. Does nothing
    where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
