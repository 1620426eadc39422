import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from launching import SECONDS
from scalevit.data.images import encode_png
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.shared_buffers import Stack
from scalevit.data.loading.train_loader import (
    EvaluationLoader,
    TrainLoader,
    _Request,
    _Training,
    _with_what_comes,
    check_fingerprint,
)
from scalevit.data.order.shuffle import Order
from scalevit.data.shards.index import load_index
from scalevit.data.transforms.timm_pipeline import evaluation_transform, training_transform
from scalevit.data.writing.writer import write_samples
from scalevit.errors import UserError

PAPER = training_transform(image_size=16, mean=(0.5, 0.5, 0.5), auto_augment="rand-m9-mstd0.5-inc1")
EVALUATION = evaluation_transform(image_size=16, crop_pct=0.9)
STEPS = 4


@pytest.fixture(scope="module")
def dataset(index):
    return ShardDataset(index, PAPER, seed=7)


@pytest.fixture(scope="module")
def training(dataset):
    """Loaders of 12 images in 12 / 2 micro-batches per step; 23 samples, so steps straddle the epochs."""
    return partial(TrainLoader, dataset, Order(23, seed=9), global_batch=12, micro_batch=2)


def steps(loader, start, stop):
    """(step, number): batch, in the order of the loader; copies, as workers use the memory of batches again."""
    batches = itertools.islice(loader.batches(start), (stop - start) * loader.accumulation)
    return {(batch.step, batch.micro_batch): batch._replace(images=batch.images.clone()) for batch in batches}


def assert_same(batches, expected):
    for key, batch in batches.items():
        assert torch.equal(batch.images, expected[key].images), key
        assert torch.equal(batch.labels, expected[key].labels), key


@pytest.fixture(scope="module", params=[1, 3])
def repeats(request):
    return request.param


@pytest.fixture(scope="module")
def expected(training, repeats):
    return steps(training(repeats=repeats), 0, STEPS)


def test_shapes(expected):
    assert list(expected) == [(step, number) for step in range(STEPS) for number in range(6)]
    for batch in expected.values():
        assert batch.images.shape == (2, 3, 16, 16)
        assert (batch.images.dtype, batch.labels.dtype) == (torch.uint8, torch.int64)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (3, 0), (6, 0), (1, 2), (2, 2), (3, 1)])
def test_neither_ranks_nor_workers_change_a_pixel(training, repeats, expected, world_size, workers):
    seen = {}
    for rank in range(world_size):
        mine = steps(training(repeats=repeats, rank=rank, world_size=world_size, workers=workers), 0, STEPS)
        assert list(mine) == [(step, number) for step in range(STEPS) for number in range(rank, 6, world_size)]
        seen |= mine
    assert seen.keys() == expected.keys()
    assert_same(seen, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_is_the_tail(training, repeats, expected, workers):
    tail = steps(training(repeats=repeats, workers=workers), 2, STEPS)
    assert list(tail) == [key for key in expected if key[0] >= 2]
    assert_same(tail, expected)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 2), (1, 4), (3, 2)])
def test_a_steps_batches_hold_while_workers_run_ahead(training, world_size, workers):
    """Workers fill their few buffers again, but none of those that the training loop may still read."""
    place = {"world_size": world_size, "workers": workers}
    expected = steps(training(world_size=world_size), 0, 2 * STEPS)
    loader = training(**place)
    batches, addresses = loader.batches(0), set()
    for _ in range(2 * STEPS):
        step = list(itertools.islice(batches, loader.accumulation))
        time.sleep(0.1)  # enough for all batches that were asked for
        for batch in step:
            assert torch.equal(batch.images, expected[batch.step, batch.micro_batch].images)
            addresses.add(batch.images.data_ptr())
    assert len(addresses) <= workers * Stack(loader.accumulation, workers).buffers < 2 * STEPS * loader.accumulation


WORLD_SIZES = [1, 2, 3, 4, 6, 8, 12, 96]


def made_by_workers(loader, workers, count):
    """What torch's DataLoader does with requests, without its processes: worker w of W is given a copy of the data set
    and the requests w, w + W, ...
    """
    requests = list(itertools.islice(loader._requests(0), count))
    copies = [pickle.loads(pickle.dumps(_Training(loader.dataset, Stack(1, 0)))) for _ in range(max(1, workers))]
    made = [None] * count
    for worker, copy in enumerate(copies):
        for place in range(worker, count, len(copies)):
            made[place] = copy[requests[place]]
    return made


def assert_share(batches, rank, world_size, order):
    """A rank's batches of one image are its share of the order, by number, label and pixels."""
    shown = [batch.samples.item() for batch in batches]
    assert shown == order[rank::world_size]
    assert shown == [batch.labels.item() for batch in batches]
    assert shown == [number for batch in batches for number in sample_numbers(batch.images)]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_global_batches_are_the_same_at_any_world_size(numbered, world_size, workers):
    """Every rank, for two steps of 96 images across an epoch of 45."""
    order = Order(45, seed=3)
    expected = order.ids(np.arange(2 * 96)).tolist()
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size}
        loader = TrainLoader(numbered[0], order, global_batch=96, micro_batch=1, **place)
        assert_share(made_by_workers(loader, workers, 2 * loader.accumulation), rank, world_size, expected)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (2, 3), (96, 3)])
def test_worker_processes_make_the_same_batches(numbered, world_size, workers):
    order = Order(45, seed=3)
    expected = order.ids(np.arange(2 * 96)).tolist()
    for rank in {0, world_size - 1}:
        place = {"rank": rank, "world_size": world_size, "workers": workers}
        loader = TrainLoader(numbered[0], order, global_batch=96, micro_batch=1, **place)
        assert_share(steps(loader, 0, 2).values(), rank, world_size, expected)


def test_ids_are_asked_for_by_epochs_or_thousands(numbered, monkeypatch):
    """An id of a large call costs a tenth of one in a small call."""
    asked = []
    ids = Order.ids
    monkeypatch.setattr(Order, "ids", lambda self, positions: (asked.append(len(positions)), ids(self, positions))[1])
    loader = TrainLoader(numbered[0], Order(45, seed=3), global_batch=12, micro_batch=4)
    steps(loader, 0, 30)
    assert set(asked) == {48}
    asked.clear()
    monkeypatch.setattr("scalevit.data.loading.train_loader._IDS_AT_ONCE", 16)
    steps(loader, 0, 30)
    assert set(asked) == {16}


def test_world_size_may_change_at_any_step(training, repeats, expected):
    seen = {}
    for start, world_size in enumerate((2, 3, 1, 6)):
        for rank in range(world_size):
            seen |= steps(training(repeats=repeats, rank=rank, world_size=world_size), start, start + 1)
    assert_same(seen, expected)


def sample_numbers(images):
    """Which sample each row shows, in a set whose images are grey of their own number."""
    return images[:, 0].float().mean((1, 2)).round().long().tolist()


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """45 grey images, number n of grey n and label n; crops and flips do not change them."""
    folder = tmp_path_factory.mktemp("numbered") / "set"
    samples = [(f"n{n}", "png", encode_png(np.full((8, 8), n, np.uint8)), n) for n in range(45)]
    write_samples(samples, folder, shard_size=20)
    index = load_index(folder)
    transform = training_transform(image_size=8, mean=(0, 0, 0), color_jitter=0)
    return ShardDataset(index, transform), ShardDataset(index, evaluation_transform(image_size=8, crop_pct=1.0))


def test_epochs_show_every_sample_once(numbered):
    loader = TrainLoader(numbered[0], Order(45, seed=0), global_batch=10, micro_batch=5)
    batches = steps(loader, 0, 9).values()
    shown = [number for batch in batches for number in sample_numbers(batch.images)]
    assert shown == [label for batch in batches for label in batch.labels.tolist()]
    assert np.bincount(shown).tolist() == [2] * 45
    assert loader.epoch_end_step(0) == 5
    assert loader.epoch_end_step(1) == loader.steps_in(2) == 9


def test_repeats_decode_once_and_keep_copies_off_their_mirror(numbered, monkeypatch):
    dataset = numbered[0]
    decoded = []
    decode = ShardDataset._decode
    monkeypatch.setattr(ShardDataset, "_decode", lambda self, sample: (decoded.append(sample), decode(self, sample))[1])
    loader = TrainLoader(dataset, Order(45, seed=0), global_batch=18, micro_batch=9, repeats=3)
    shown = []
    for batch in steps(loader, 0, 5).values():
        numbers = sample_numbers(batch.images)
        shown += numbers
        assert sorted(np.bincount(numbers)[np.unique(numbers)].tolist()) == [3, 3, 3]
        assert all(numbers[row] != numbers[-1 - row] for row in range(4))
    assert len(decoded) == len(shown) / 3 == 30
    assert sorted(shown) == sorted(decoded * 3)
    assert len(set(decoded)) == 30


def test_copies_differ(training):
    """Three rows, three copies of the same image."""
    loader = TrainLoader(training.args[0], Order(23, seed=9), global_batch=3, micro_batch=3, repeats=3)
    (batch,) = steps(loader, 0, 1).values()
    assert len(set(batch.labels.tolist())) == 1
    assert not any(torch.equal(batch.images[a], batch.images[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("workers", [0, 1])
def test_generators_of_the_training_process_are_left_alone(training, workers):
    torch.manual_seed(0), np.random.seed(0)
    expected = torch.rand(3).tolist(), np.random.rand()
    torch.manual_seed(0), np.random.seed(0)
    steps(training(workers=workers), 0, 1)
    assert (torch.rand(3).tolist(), np.random.rand()) == expected


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (50, 0), (2, 2)])
@pytest.mark.parametrize("batch", [7, 64])
def test_evaluation_counts_every_sample_once(numbered, world_size, workers, batch):
    dataset, seen, sizes = numbered[1], [], set()
    for rank in range(world_size):
        loader = EvaluationLoader(dataset, batch=batch, rank=rank, world_size=world_size, workers=workers)
        for _ in range(2):  # an evaluation again, by the same workers
            batches = list(loader)
            assert len(batches) == len(loader)
        for images, labels, weights, decoded, faults in batches:
            assert decoded.all()
            assert not faults
            real = weights == 1
            assert ((weights == 0) | real).all()
            assert (images[~real] == 0).all()
            assert (labels[~real] == 0).all()
            assert sample_numbers(images[real]) == labels[real].tolist()
            seen += labels[real].tolist()
            sizes.add((len(loader), len(weights)))
            assert len(images) == len(labels) == len(weights) <= batch
    assert sorted(seen) == list(range(45))
    assert len(sizes) == 1


def test_settings_that_do_not_fit(training):
    with pytest.raises(UserError, match=r"train\.global_batch = 12 .*4 ranks cannot share evenly"):
        training(rank=0, world_size=4)


def test_fingerprint_names_what_differs(dataset, training):
    first = training().fingerprint
    assert training(rank=1, world_size=2, workers=1).fingerprint == first
    other = TrainLoader(dataset, Order(23, seed=8), global_batch=12, micro_batch=2).fingerprint
    assert [name for name in first if first[name] != other[name]] == ["seed", "order"]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """20 grey images of their own number, of which 3, 8 and 9 are none."""
    folder = tmp_path_factory.mktemp("damaged") / "set"
    samples = [(f"n{n}", "png", encode_png(np.full((8, 8), n, np.uint8)), n) for n in range(20)]
    for bad in (3, 8, 9):
        samples[bad] = (f"bad{bad}", "png", b"no image %d" % bad, bad)
    write_samples(samples, folder, shard_size=7)
    index = load_index(folder)
    transform = training_transform(image_size=8, mean=(0, 0, 0), color_jitter=0)
    return ShardDataset(index, transform), ShardDataset(index, evaluation_transform(image_size=8, crop_pct=1.0))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 1), (4, 0)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_bad_samples_are_replaced_alike_on_all_ranks_and_listed(damaged, world_size, workers, repeats):
    def run(world_size, workers):
        seen, faults = {}, []
        for rank in range(world_size):
            place = {"rank": rank, "world_size": world_size, "workers": workers}
            loader = TrainLoader(
                damaged[0], Order(20, seed=1), global_batch=12, micro_batch=3, repeats=repeats, **place
            )
            for key, batch in steps(loader, 0, 5 * repeats).items():
                seen[key] = batch
                faults += batch.faults
                assert sample_numbers(batch.images) == batch.labels.tolist() == batch.samples.tolist()
        return seen, faults

    expected, _ = run(1, 0)
    seen, faults = run(world_size, workers)
    assert_same(seen, expected)
    shown = np.concatenate([batch.samples for batch in seen.values()])
    assert not {3, 8, 9} & set(shown.tolist())
    # 60 positions, three epochs, for every repeat once: in each all bad ones came up.
    if repeats == 1:
        assert len(faults) >= 9
    assert {fault.key for fault in faults} == {"bad3", "bad8", "bad9"}


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (3, 0), (2, 1), (25, 0)])
def test_evaluation_shows_undecodable_images_as_such(damaged, world_size, workers):
    seen, keys, undecoded = [], [], []
    for rank in range(world_size):
        for batch in EvaluationLoader(damaged[1], batch=4, rank=rank, world_size=world_size, workers=workers):
            real = batch.weights == 1
            seen += batch.labels[real].tolist()
            undecoded += batch.labels[real & ~batch.decoded].tolist()
            assert (batch.images[~batch.decoded] == 0).all()
            assert batch.decoded[~real].all()
            keys += [fault.key for fault in batch.faults]
            assert sample_numbers(batch.images[real & batch.decoded]) == batch.labels[real & batch.decoded].tolist()
    assert sorted(seen) == list(range(20))
    assert sorted(undecoded) == [3, 8, 9]
    assert sorted(keys) == ["bad3", "bad8", "bad9"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_shard_is_one_line_whoever_finds_it(damaged, tmp_path, workers):
    shutil.copytree(Path(damaged[0].index.shards[0].path).parent, tmp_path / "set")
    index = load_index(tmp_path / "set")
    (tmp_path / "set" / "shard-000001.tar").unlink()
    loaders = (
        TrainLoader(ShardDataset(index, PAPER), Order(20, 0), global_batch=2, micro_batch=2, workers=workers).batches(
            0
        ),
        EvaluationLoader(ShardDataset(index, EVALUATION), batch=2, workers=workers),
    )
    for loader in loaders:
        with pytest.raises(UserError, match=r"shard .*shard-000001.tar: cannot be read") as caught:
            list(loader)
        assert "\n" not in str(caught.value)
        # No cycle of the error and the frame that holds the workers: see `loader.items`.
        assert caught.value not in caught.traceback[-1].frame.f_locals.values()


def test_requests_know_what_comes():
    def requests():
        for number in range(100):
            samples = np.array([number])
            yield _Request(number, 0, samples, samples, samples)

    told = [request.soon.tolist() for request in itertools.islice(_with_what_comes(requests(), 4), 6)]
    assert told == [[1, 2, 3, 4], [5], [6], [7], [8], [9]]


def test_a_differing_fingerprint_is_refused_with_the_difference(dataset, training):
    first = training().fingerprint
    check_fingerprint(first, training(rank=1, world_size=2, workers=1).fingerprint, "checkpoint X")
    for loader, message in (
        (TrainLoader(dataset, Order(23, seed=8), global_batch=12, micro_batch=2), r"\(seed: 9 there, 8 now\)"),
        (training(repeats=3), r"\(data.augmentation.aug_repeats: 1 there, 3 now\)"),
    ):
        with pytest.raises(UserError, match=f"^checkpoint X: .*{message}") as caught:
            check_fingerprint(first, loader.fingerprint, "checkpoint X")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"training shards: .* there, 0123 now"):
        check_fingerprint(first, first | {"index": "0123"}, "checkpoint X")
    with pytest.raises(UserError, match="number of training samples: 23 there, 24 now"):
        check_fingerprint(first, first | {"samples": 24, "order": "x"}, "checkpoint X")


SCRIPT = """
# No `__name__` guard: workers must not run this again.
import multiprocessing, signal, sys, time
import torchvision.transforms.functional
from scalevit.data.loading.train_loader import EvaluationLoader, TrainLoader
from scalevit.data.order.shuffle import Order
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.shards.index import load_index

for number in (signal.SIGTERM, signal.SIGINT):  # as a trainer that saves and goes on
    signal.signal(number, lambda *_: None)
transform = torchvision.transforms.functional.pil_to_tensor
dataset = ShardDataset(load_index(sys.argv[1]), transform)
training = TrainLoader(dataset, Order(len(dataset), 0), global_batch=4, micro_batch=4, workers=1).batches(0)
evaluation = EvaluationLoader(dataset, batch=4, workers=1)
next(training), list(evaluation)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
while sys.stdin.readline() == "go on\\n":
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
        trainer.stdin.write("go on\n")
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
