"""What a process does with memory that it has freed."""

import ctypes

# of mallopt(3), of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Have glibc keep what pictures and tensors free, instead of handing it back and faulting it in again.

    A worker of Ray hands back everything at once, so every picture costs it the page faults of its size.
    Pieces above 32 MB are still handed back (the most that `M_MMAP_THRESHOLD` takes). Elsewhere than with
    glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, size_bytes in ((_M_MMAP_THRESHOLD, 32 * 2**20), (_M_TRIM_THRESHOLD, 2**30)):
            mallopt(parameter, size_bytes)
