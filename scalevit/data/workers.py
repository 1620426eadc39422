"""How worker processes start and end.

They are forked by a fork server: forking a process that has a process group is not safe (gloo and NCCL run threads and
may hold pinned network memory), and fresh interpreters would import torch once per worker instead of once per rank.
Knows processes and signals; must not know data.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import context, forkserver, parent_process, resource_tracker, spawn
from typing import Any

# Ctrl-C and a scheduler's SIGTERM reach the whole process group. Workers that ended on it would take the emergency
# checkpoint of the training process with them, so they run until that process ends them or ends itself.
_TO_PARENT_ONLY = (signal.SIGINT, signal.SIGTERM)


def worker_context(preload: tuple[str, ...] = ()) -> context.BaseContext:
    """The multiprocessing context of workers, with its fork server running.

    Args:
        preload: modules that the server imports for all workers; only the first call of a process has an effect.
    """
    forkserver.set_forkserver_preload(list(preload))
    # The server inherits this thread's signal mask. The tracker must be started before, because starting it clears it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_PARENT_ONLY)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _CONTEXT


def initialise_worker(worker: int = 0) -> None:
    """To be called first in each worker. The number is an argument of the DataLoader's and not used."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _TO_PARENT_ONLY)
    parent = parent_process()
    if parent is not None:
        for watch in (_end_with_parent, _end_on_parents_signal):
            threading.Thread(target=watch, args=(parent,), daemon=True).start()


def _end_with_parent(parent: Any) -> None:
    """Otherwise workers would outlive a killed training process, because their own parent is the fork server."""
    parent.join()
    os._exit(1)


def _end_on_parents_signal(parent: Any) -> None:
    """SIGTERM of the training process ends a worker: at exit, multiprocessing sends it and waits for all workers."""
    while True:
        signal_info = signal.sigwaitinfo(_TO_PARENT_ONLY)
        if signal_info.si_pid == parent.pid:
            os._exit(1)


# --- without the main script ------------------------------------------------------------------------------
# multiprocessing imports the main script in every worker: a launch script with its engines, or a script without a
# `__name__` guard, which would start workers itself. Workers need nothing of it. Replacing sys.modules["__main__"]
# meanwhile would break other threads of this process that pickle something of the script (checkpoints), so the script
# is removed from the data that multiprocessing sends, and only for processes that this thread starts.

_thread = threading.local()
_get_preparation_data = spawn.get_preparation_data


def _preparation_data(name: str) -> dict[str, Any]:
    data = _get_preparation_data(name)
    if getattr(_thread, "without_main", False):
        for key in ("init_main_from_name", "init_main_from_path"):
            data.pop(key, None)
    return data


spawn.get_preparation_data = _preparation_data


@contextmanager
def without_main_module() -> Iterator[None]:
    """Processes that this thread starts in the block do not import the main script."""
    _thread.without_main = True
    try:
        yield
    finally:
        _thread.without_main = False


class _WorkerProcess(context.ForkServerProcess):
    def start(self) -> None:
        with without_main_module():
            super().start()


class _WorkerContext(context.ForkServerContext):
    Process = _WorkerProcess


_CONTEXT = _WorkerContext()
