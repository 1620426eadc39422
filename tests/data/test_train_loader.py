import itertools
import pickle
import time
from functools import partial

import numpy as np
import pytest
import torch

from numbered_images import sample_numbers
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.shared_buffers import BatchBuffers
from scalevit.data.loading.train_loader import TrainLoader, _Request, _Training, check_fingerprint, with_lookahead
from scalevit.data.order.shuffle import Order
from scalevit.data.transforms.base import TrainingAugmentation
from scalevit.data.transforms.timm_pipeline import training_transform
from scalevit.errors import SettingError, UserError

PAPER = training_transform(
    TrainingAugmentation(image_size=16, mean=(0.5, 0.5, 0.5), auto_augment="rand-m9-mstd0.5-inc1")
)
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
    assert (
        len(addresses) <= workers * BatchBuffers(loader.accumulation, workers).buffers < 2 * STEPS * loader.accumulation
    )


WORLD_SIZES = [1, 2, 3, 4, 6, 8, 12, 96]


def made_by_workers(loader, workers, count):
    """What torch's DataLoader does with requests, without its processes: worker w of W is given a copy of the data set
    and the requests w, w + W, ...
    """
    requests = list(itertools.islice(loader._requests(0), count))
    copies = [pickle.loads(pickle.dumps(_Training(loader.dataset, BatchBuffers(1, 0)))) for _ in range(max(1, workers))]
    made = [None] * count
    for worker, copy in enumerate(copies):
        for place in range(worker, count, len(copies)):
            made[place] = copy[requests[place]]
    return made


def assert_share(batches, rank, world_size, order):
    """A rank's batches of one image are its share of the order, by label and pixels."""
    shown = [batch.labels.item() for batch in batches]
    assert shown == order[rank::world_size]
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


def test_epochs_show_every_sample_once(numbered):
    loader = TrainLoader(numbered[0], Order(45, seed=0), global_batch=10, micro_batch=5)
    batches = steps(loader, 0, 9).values()
    shown = [number for batch in batches for number in sample_numbers(batch.images)]
    assert shown == [label for batch in batches for label in batch.labels.tolist()]
    assert np.bincount(shown).tolist() == [2] * 45
    assert loader.epoch_end_step(0) == 5
    assert loader.epoch_end_step(1) == loader.steps_in(2) == 9
    assert [loader.epoch_of(step) for step in (0, 4, 5, 8, 9)] == [0, 0, 1, 1, 2]


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


def test_settings_that_do_not_fit(training):
    with pytest.raises(SettingError, match=r"^global_batch = 12: .*not divisible among 4 ranks"):
        training(rank=0, world_size=4)


def test_fingerprint_names_what_differs(dataset, training):
    first = training().fingerprint
    assert training(rank=1, world_size=2, workers=1).fingerprint == first
    other = TrainLoader(dataset, Order(23, seed=8), global_batch=12, micro_batch=2).fingerprint
    assert [name for name in first if first[name] != other[name]] == ["seed", "order"]


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
                assert sample_numbers(batch.images) == batch.labels.tolist()
        return seen, faults

    expected, _ = run(1, 0)
    seen, faults = run(world_size, workers)
    assert_same(seen, expected)
    shown = np.concatenate([batch.labels for batch in seen.values()])
    assert not {3, 8, 9} & set(shown.tolist())
    # 60 positions, three epochs, for every repeat once: in each all bad ones came up.
    if repeats == 1:
        assert len(faults) >= 9
    assert {fault.key for fault in faults} == {"bad3", "bad8", "bad9"}


def test_requests_name_upcoming_samples():
    def requests():
        for number in range(100):
            samples = np.array([number])
            yield _Request(number, 0, samples, samples, samples)

    upcoming = [request.upcoming.tolist() for request in itertools.islice(with_lookahead(requests(), 4), 6)]
    assert upcoming == [[1, 2, 3, 4], [5], [6], [7], [8], [9]]


def test_a_differing_fingerprint_is_refused_with_the_difference(dataset, training):
    first = training().fingerprint
    check_fingerprint(first, training(rank=1, world_size=2, workers=1).fingerprint, "checkpoint X")
    for loader, message in (
        (TrainLoader(dataset, Order(23, seed=8), global_batch=12, micro_batch=2), r"\(seed: 9 there, 8 now\)"),
        (training(repeats=3), r"\(data.augmentation.aug_repeats: 1 there, 3 now\)"),
    ):
        with pytest.raises(UserError, match=f"^checkpoint X: .*{message}") as caught:
            check_fingerprint(first, loader.fingerprint, "checkpoint X", {"repeats": "data.augmentation.aug_repeats"})
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"training shards: .* there, 0123 now"):
        check_fingerprint(first, first | {"index": "0123"}, "checkpoint X")
    with pytest.raises(UserError, match="number of training samples: 23 there, 24 now"):
        check_fingerprint(first, first | {"samples": 24, "order": "x"}, "checkpoint X")
