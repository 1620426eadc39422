"""Threads and allocator of a process that computes on the CPU. Must not know process groups, models or engines."""

import ctypes
import os
import platform

import torch

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def prepare_cpu(*, ranks_per_node: int, loaders: int = 0) -> None:
    """Shares the cores of a machine among its ranks, and has each rank keep its freed memory.

    Launchers leave one thread or all cores to each rank.

    Args:
        loaders: processes that each rank starts beside itself, which take cores from it.
    """
    cores = len(os.sched_getaffinity(0)) // ranks_per_node
    torch.set_num_threads(max(1, cores - loaders))
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed for the next allocation, instead of giving it back to the kernel.

    A training step allocates the same activations again and again. By default large ones are given back each time, and
    the kernel hands them out again zeroed and page by page. The process keeps its peak until it ends (docs/log.md has
    what it gains and costs). Other C libraries are not changed.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)  # the largest
