"""How worker processes start, and how they end.

They come from a fork server: forking a process that has a process group is not safe (gloo and NCCL run threads and may
hold pinned network memory), and fresh interpreters would import torch once per worker instead of once per rank. Knows
processes and signals; must not know data.
"""

import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import context, forkserver, get_context, parent_process, resource_tracker
from typing import Any

# Ctrl-C and a scheduler's SIGTERM reach the whole process group. Workers that died of it would take the emergency
# checkpoint of the training process with them, so they live until that process ends them or ends itself.
_TO_PARENT_ONLY = (signal.SIGINT, signal.SIGTERM)


def worker_context(preload: tuple[str, ...] = ()) -> context.BaseContext:
    """The multiprocessing context for workers, its server started.

    Args:
        preload: modules that the server imports for all workers; only the first call of a process decides.
    """
    forkserver.set_forkserver_preload(list(preload))
    # The server inherits the mask of this thread. The tracker must run before: starting it clears the mask.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_PARENT_ONLY)
    try:
        with hidden_main():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return get_context("forkserver")


@contextmanager
def hidden_main() -> Iterator[None]:
    """Around the start of workers: they need nothing of the main script, so they do not run it again.

    multiprocessing would import it in every worker: the launch script with its engines, or a script without a
    `__name__` guard, which would start workers in turn.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def initialise_worker(worker: int = 0) -> None:
    """To be called first in each worker; the number is the DataLoader's and not used."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _TO_PARENT_ONLY)
    parent = parent_process()
    if parent is not None:
        for watch in (_end_with_parent, _end_when_told):
            threading.Thread(target=watch, args=(parent,), daemon=True).start()


def _end_with_parent(parent: Any) -> None:
    """Workers of a fork server outlive a killed training process otherwise: their parent is the server."""
    parent.join()
    os._exit(1)


def _end_when_told(parent: Any) -> None:
    """The one sender of SIGTERM that counts: multiprocessing waits for ever at exit for workers that ignore it."""
    while True:
        signal_info = signal.sigwaitinfo(_TO_PARENT_ONLY)
        if signal_info.si_pid == parent.pid:
            os._exit(1)
