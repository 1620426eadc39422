import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from launching import SECONDS
from scalevit.data.workers import initialise_worker, worker_context

SCRIPT = """
# No `__name__` guard: workers must not run this again.
import multiprocessing, signal, sys, time
import torchvision.transforms.functional
from scalevit.data.loading.evaluation_loader import EvaluationLoader
from scalevit.data.loading.train_loader import TrainLoader
from scalevit.data.order.shuffle import Order
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.shards.index import load_index

for number in (signal.SIGTERM, signal.SIGINT):  # as a trainer that saves and continues
    signal.signal(number, lambda *_: None)
transform = torchvision.transforms.functional.pil_to_tensor
dataset = ShardDataset(load_index(sys.argv[1]), transform)
training = TrainLoader(dataset, Order(len(dataset), 0), global_batch=4, micro_batch=4, workers=1).batches(0)
evaluation = EvaluationLoader(dataset, batch=4, workers=1)
next(training), list(evaluation)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
while sys.stdin.readline() == "continue\\n":
    [next(training) for _ in range(20)], list(evaluation)
    print("alive", flush=True)
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_workers_outlive_signals_to_the_group_but_not_the_trainer(shards, tmp_path, end):
    (tmp_path / "script.py").write_text(SCRIPT)
    trainer = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", shards],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2
        for number in (signal.SIGTERM, signal.SIGINT):
            os.killpg(trainer.pid, number)
        time.sleep(0.3)
        trainer.stdin.write("continue\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline() == "alive\n"
        assert all(alive(pid) for pid in workers)
        if end == "kill":
            trainer.kill()
        else:
            trainer.stdin.close()  # the script ends with both loaders still there
        assert trainer.wait(SECONDS) == (0 if end == "exit" else -signal.SIGKILL)
        assert wait_until_dead(workers, SECONDS)
    finally:
        trainer.kill()
        trainer.wait()


def add(one, other):
    return one + other


def test_starting_workers_does_not_touch_the_main_module(monkeypatch):
    """Another thread (checkpoints) may pickle something of the main script meanwhile."""
    main = sys.modules["__main__"]

    class OfTheScript:
        pass

    OfTheScript.__module__, OfTheScript.__qualname__ = "__main__", "OfTheScript"
    monkeypatch.setattr(main, "OfTheScript", OfTheScript, raising=False)
    pickled, failures, stop = 0, [], threading.Event()

    def pickle_all_the_time():
        nonlocal pickled
        while not stop.is_set():
            try:
                assert sys.modules["__main__"] is main
                assert type(pickle.loads(pickle.dumps(OfTheScript()))) is OfTheScript
                pickled += 1
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=pickle_all_the_time)
    thread.start()
    try:
        for _ in range(3):
            with ProcessPoolExecutor(2, mp_context=worker_context(), initializer=initialise_worker) as pool:
                assert list(pool.map(add, range(4), range(4))) == [0, 2, 4, 6]
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert pickled > 10


WITHOUT_GUARD = """
import sys, multiprocessing
from scalevit.data.workers import worker_context, without_main_module
print("main", flush=True)
if sys.argv[1] == "worker":
    process = worker_context().Process(target=print, args=("worker",))
else:
    process = multiprocessing.get_context("spawn").Process(target=print, args=("worker",))
process.start()
process.join()
"""


@pytest.mark.parametrize("kind", ["worker", "other"])
def test_only_our_workers_leave_out_the_main_script(tmp_path, kind):
    """A script without a `__name__` guard: run again in a process, it fails when it starts another one."""
    (tmp_path / "script.py").write_text(WITHOUT_GUARD)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", kind], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    shown = done.stdout.split()
    assert shown == (["main", "worker"] if kind == "worker" else ["main", "main"]), done.stderr
