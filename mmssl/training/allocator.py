"""Memory that is kept between steps instead of being given back to the system and asked for again."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
MIB = 2**20


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """On a CPU let glibc's malloc keep what is freed, and give it back at the end."""
    if device.type != "cpu":
        yield
        return
    keep_freed_memory()
    try:
        yield
    finally:
        if (libc := glibc()) is not None:
            # Where malloc's own adjustment ends among large blocks; once something is set it does not adjust any more.
            for option, value in ((M_MMAP_MAX, 65_536), (M_MMAP_THRESHOLD, 32 * MIB), (M_TRIM_THRESHOLD, 64 * MIB)):
                libc.mallopt(option, value)
            libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, from now on; does nothing where there is no glibc.

    A training step allocates the same large blocks again and again. By default each is mapped anew, and every page of
    it is zeroed by the system when it is first written: up to 10 % of a step (docs/performance.md).
    """
    if (libc := glibc()) is not None:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # another system
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
