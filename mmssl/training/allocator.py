"""Memory that is kept between steps instead of being given back to the system and asked for again."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, for CPU training; does nothing where there is no glibc.

    A training step allocates the same large blocks again and again. By default each is mapped anew, and every page of
    it is zeroed by the system when it is first written: 5 to 10 % of a step (docs/performance.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
