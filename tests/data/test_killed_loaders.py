"""Ranks that are killed, and others that resume: each row once, with the sample that belongs there."""

import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np

from launching import SECONDS
from scalevit.data.images import encode_png
from scalevit.data.order.batching import BatchLayout
from scalevit.data.order.shuffle import Order
from scalevit.data.shards.index import load_index
from scalevit.data.writing.writer import write_samples

SAMPLES, GLOBAL_BATCH, STEPS, SEED = 100, 12, 60, 5

# A rank: consumes its batches up to a step and logs rows and keys of each, as a trainer that counts what it has used.
RANK = f"""
import sys, time
from scalevit.data.order.shuffle import Order
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.train_loader import TrainLoader
from scalevit.data.shards.index import load_index
import torchvision.transforms.functional

folder, log = sys.argv[1:3]
rank, world_size, workers, micro_batch, start, linger = map(int, sys.argv[3:])
index = load_index(folder)
dataset = ShardDataset(index, torchvision.transforms.functional.pil_to_tensor)
loader = TrainLoader(dataset, Order(len(index), {SEED}), global_batch={GLOBAL_BATCH},
                     micro_batch=micro_batch, rank=rank, world_size=world_size, workers=workers)
with open(log, "a", buffering=1) as file:
    for batch in loader.batches(start):
        if batch.step == {STEPS}:
            time.sleep(linger)
            break
        rows = zip(batch.rows.tolist(), batch.labels.tolist(), strict=True)
        file.write("".join(f"{{batch.step}} {{row}} n{{label}}\\n" for row, label in rows if row >= 0))
        time.sleep(0.005)
"""


def start_ranks(folder, log, world_size, *settings):
    """settings: workers, micro-batch, first step, and the seconds that a rank waits at its end, for one that is killed
    and must not end before.
    """
    settings = [str(setting) for setting in (world_size, *settings)]
    return [
        subprocess.Popen([sys.executable, "-c", RANK, folder, f"{log}-{rank}", str(rank), *settings])
        for rank in range(world_size)
    ]


def consumed(log, world_size):
    """(step, row): key, of every rank; half a line that a killed process left does not count."""
    found = {}
    for rank in range(world_size):
        path = log.with_name(f"{log.name}-{rank}")
        for line in (path.read_text() if path.exists() else "").split("\n")[:-1]:
            step, row, key = line.split(" ")
            assert (int(step), int(row)) not in found
            found[int(step), int(row)] = key
    return found


def finished_steps(found, first):
    """The step that all ranks have finished: what a checkpoint would hold."""
    step = first
    while all((step, row) in found for row in range(GLOBAL_BATCH)):
        step += 1
    return step


def test_killed_at_random_steps_and_resumed_by_one_and_by_five(tmp_path):
    """With other micro-batches, too: 12 rows are no equal shares for five ranks."""
    folder = tmp_path / "set"
    samples = [(f"n{n}", "png", encode_png(np.full((2, 2), n, np.uint8)), n) for n in range(SAMPLES)]
    write_samples(samples, folder, shard_size=30)
    index = load_index(folder)
    choose = random.Random()  # another step each time the test runs
    history, step = {}, 0
    for part, (world_size, workers, micro_batch) in enumerate([(2, 1, 2), (1, 2, 5), (5, 0, 3)]):
        log = tmp_path / f"log{part}"
        linger = 0 if part == 2 else round(SECONDS)
        ranks = start_ranks(folder, log, world_size, workers, micro_batch, step, linger)
        last_step = STEPS if part == 2 else step + choose.randrange(2, 18)
        try:
            deadline = time.monotonic() + SECONDS
            while finished_steps(consumed(log, world_size), step) < last_step:
                assert time.monotonic() < deadline
                assert part == 2 or all(rank.poll() is None for rank in ranks)
                time.sleep(0.05)
            if part == 2:
                assert [rank.wait(SECONDS) for rank in ranks] == [0] * world_size
        finally:
            for rank in ranks:
                rank.kill()
            ended = [rank.wait(SECONDS) for rank in ranks]
        if part < 2:
            assert set(ended) == {-signal.SIGKILL}
        found = consumed(log, world_size)
        reached = finished_steps(found, step)
        # What a rank consumed beyond the step that all have finished is done again, as after any checkpoint.
        history |= {place: key for place, key in found.items() if place[0] < reached}
        step = reached
    assert step == STEPS
    order, layout, rows = Order(SAMPLES, SEED), BatchLayout(GLOBAL_BATCH), np.arange(GLOBAL_BATCH)
    expected = {}
    for at in range(STEPS):
        samples = order.ids(layout.rows(at, rows)[0])
        expected |= {(at, row): index.key(sample) for row, sample in enumerate(samples)}
    assert history == expected
    assert set(Counter(history.values()).values()) == {7, 8}, "7.2 epochs"
    assert len(set(history.values())) == SAMPLES
