"""The C library's memory for a process that computes on the CPU. Must not know tensors or engines."""

import ctypes
import platform

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed for the next allocation, instead of giving it back to the kernel.

    A training step allocates the same activations again and again. By default large ones are given back each time, and
    the kernel hands them out again zeroed and page by page. The process keeps its peak until it ends (docs/LOG.md has
    what it gains and costs). Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)  # the largest
