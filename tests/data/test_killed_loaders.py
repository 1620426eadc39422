"""Ranks that are killed, and others that resume: each sample once, in the same order."""

import random
import signal
import subprocess
import sys
import time

import numpy as np

from launching import SECONDS
from scalevit.data.images import encode_png
from scalevit.data.order.shuffle import Order
from scalevit.data.shards.index import load_index
from scalevit.data.writing.writer import write_samples

SAMPLES, GLOBAL_BATCH, STEPS, SEED = 100, 12, 60, 5

# A rank: consumes its micro-batches up to a step and logs the keys of each, as a trainer that counts what it has used.
RANK = f"""
import sys, time
from scalevit.data.order.shuffle import Order
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.train_loader import TrainLoader
from scalevit.data.shards.index import load_index
import torchvision.transforms.functional

folder, log, rank, world_size, workers, start, linger = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
index = load_index(folder)
dataset = ShardDataset(index, torchvision.transforms.functional.pil_to_tensor)
loader = TrainLoader(dataset, Order(len(index), {SEED}), global_batch={GLOBAL_BATCH}, micro_batch=2,
                     rank=rank, world_size=world_size, workers=workers)
with open(log, "a", buffering=1) as file:
    for batch in loader.batches(start):
        if batch.step == {STEPS}:
            time.sleep(linger)
            break
        keys = ",".join(f"n{{label}}" for label in batch.labels.tolist())
        file.write(f"{{batch.step}} {{batch.micro_batch}} {{keys}}\\n")
        time.sleep(0.005)
"""


def start_ranks(folder, log, world_size, step, workers, linger):
    """linger: seconds that a rank waits at its end, for one that is killed and must not end before."""
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, folder, f"{log}-{rank}", *map(str, (rank, world_size, workers, step, linger))]
        )
        for rank in range(world_size)
    ]


def consumed(log, world_size):
    """(step, micro-batch): keys, of every rank; half a line that a killed process left does not count."""
    found = {}
    for rank in range(world_size):
        path = log.with_name(f"{log.name}-{rank}")
        for line in (path.read_text() if path.exists() else "").split("\n")[:-1]:
            step, number, keys = line.split(" ")
            found[int(step), int(number)] = keys.split(",")
    return found


def finished_steps(found, first):
    """The step that all ranks have finished: what a checkpoint would hold."""
    step = first
    while all((step, number) in found for number in range(GLOBAL_BATCH // 2)):
        step += 1
    return step


def test_killed_at_random_steps_and_resumed_by_one_and_by_three(tmp_path):
    folder = tmp_path / "set"
    samples = [(f"n{n}", "png", encode_png(np.full((2, 2), n, np.uint8)), n) for n in range(SAMPLES)]
    write_samples(samples, folder, shard_size=30)
    index = load_index(folder)
    choose = random.Random()  # another step each time the test runs
    history, step = {}, 0
    for part, (world_size, workers) in enumerate([(2, 1), (1, 2), (3, 0)]):
        log = tmp_path / f"log{part}"
        ranks = start_ranks(folder, log, world_size, step, workers, linger=0 if part == 2 else round(SECONDS))
        last_step = STEPS if part == 2 else step + choose.randrange(2, 18)
        try:
            deadline = time.monotonic() + SECONDS
            while finished_steps(consumed(log, world_size), step) < last_step:
                assert time.monotonic() < deadline
                assert part == 2 or all(rank.poll() is None for rank in ranks)
                time.sleep(0.05)
            if part == 2:
                assert [rank.wait(SECONDS) for rank in ranks] == [0, 0, 0]
        finally:
            for rank in ranks:
                rank.kill()
            ended = [rank.wait(SECONDS) for rank in ranks]
        if part < 2:
            assert set(ended) == {-signal.SIGKILL}
        found = consumed(log, world_size)
        reached = finished_steps(found, step)
        # What a rank consumed beyond the step that all have finished is done again, as after any checkpoint.
        history |= {place: keys for place, keys in found.items() if place[0] < reached}
        step = reached
    assert step == STEPS
    expected = [index.key(sample) for sample in Order(SAMPLES, SEED).ids(np.arange(STEPS * GLOBAL_BATCH))]
    slots = np.arange(STEPS * GLOBAL_BATCH).reshape(STEPS, 2, GLOBAL_BATCH // 2)  # step, row, micro-batch
    assert len(history) == STEPS * GLOBAL_BATCH // 2
    for (at, number), keys in history.items():
        assert keys == [expected[slots[at, row, number]] for row in range(2)], (at, number)
