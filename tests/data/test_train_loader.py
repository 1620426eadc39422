import itertools
import pickle
import random
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from numbered_images import sample_numbers
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.shared_buffers import BatchBuffers
from scalevit.data.loading.train_loader import TrainLoader, _Request, _Training, check_fingerprint, with_lookahead
from scalevit.data.order.batching import PADDING, BatchLayout, Split
from scalevit.data.order.shuffle import Order
from scalevit.data.transforms.base import TrainingAugmentation
from scalevit.data.transforms.timm_pipeline import TimmTraining
from scalevit.errors import SettingError, UserError

RECIPE = TrainingAugmentation(image_size=16, mean=(0.5, 0.5, 0.5), auto_augment="rand-m9-mstd0.5-inc1")
PAPER = TimmTraining(RECIPE)
STEPS = 4


@pytest.fixture(scope="module")
def dataset(index):
    return ShardDataset(index, PAPER, seed=7)


@pytest.fixture(scope="module")
def training(dataset):
    """Loaders of 12 images in micro-batches of 2; 23 samples, so steps straddle the epochs."""
    return partial(TrainLoader, dataset, Order(23, seed=9), **{"global_batch": 12, "micro_batch": 2})


def rows_in(batch):
    """(step, row): image and label, but of padding, which is black and has label 0."""
    padding = batch.rows == PADDING
    assert not batch.images[padding].any()
    assert not batch.labels[padding].any()
    images = batch.images.clone()  # workers use the memory of batches again
    rows = zip(batch.rows.tolist(), images, batch.labels.tolist(), strict=True)
    return {(batch.step, row): (image, label) for row, image, label in rows if row != PADDING}


def load(loader, start, stop):
    """Batches of some steps, in order: each has the rows that `Split` says."""
    batches = itertools.islice(loader.batches(start), (stop - start) * loader.split.loads)
    expected = [each for step in range(start, stop) for each in loader.split.of_rank(loader.rank, step)]
    for batch, (step, rows) in zip(batches, expected, strict=True):
        assert (batch.step, batch.rows.tolist()) == (step, rows.tolist())
        assert len(batch.images) == len(batch.labels) == loader.split.loaded_rows
        yield batch


def load_rows(make, start, stop, world_size=1, **settings):
    """All rows of some steps, from all ranks."""
    found = {}
    for rank in range(world_size):
        for batch in load(make(rank=rank, world_size=world_size, **settings), start, stop):
            rows = rows_in(batch)
            assert not rows.keys() & found.keys(), "a row comes from one rank, once"
            found |= rows
    return found


def assert_same(rows, expected):
    assert rows.keys() == expected.keys()
    for place, (image, label) in rows.items():
        assert torch.equal(image, expected[place][0]), place
        assert label == expected[place][1], place


def of_steps(rows, start, stop):
    return {place: row for place, row in rows.items() if start <= place[0] < stop}


@pytest.fixture(scope="module", params=[1, 3])
def repeats(request):
    return request.param


@pytest.fixture(scope="module")
def expected(training, repeats):
    rows = load_rows(training, 0, STEPS, repeats=repeats)
    assert list(rows) == [(step, row) for step in range(STEPS) for row in range(12)]
    return rows


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "loads", "rows", "fewest"),
    [
        (1, 2, 6, 2, 2),
        (1, 3, 6, 2, 2),
        (1, 5, 3, 4, 4),
        (2, 4, 2, 4, 2),
        (5, 2, 2, 2, 0),
        (5, 64, 1, 4, 2),
        (7, 1, 1, 2, 0),
        (12, 1, 1, 2, 0),
    ],
)
def test_all_batches_have_the_same_shape(training, world_size, micro_batch, loads, rows, fewest):
    """Also those with padding, and those of nothing else; fewest: rows that are no padding."""
    real = []
    for rank in range(world_size):
        loader = training(rank=rank, world_size=world_size, micro_batch=micro_batch)
        assert (loader.split.loads, loader.split.loaded_rows) == (loads, rows)
        for batch in load(loader, 0, 2):
            assert batch.images.shape == (rows, 3, 16, 16)
            assert (batch.images.dtype, batch.labels.dtype, batch.rows.dtype) == (torch.uint8, torch.int64, torch.int64)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            real.append(len(rows_in(batch)))
    assert sum(real) == 2 * 12
    assert min(real) == fewest


@pytest.mark.parametrize(
    ("world_size", "workers", "micro_batch"),
    [
        *[(world_size, 0, 2) for world_size in (2, 3, 4, 5, 6, 7, 12)],
        *[(1, 0, micro_batch) for micro_batch in (1, 3, 4, 5, 7, 12, 64)],
        *[(1, 2, 2), (2, 2, 5), (3, 1, 1), (5, 2, 2), (7, 0, 12)],
    ],
)
def test_neither_ranks_nor_workers_nor_micro_batches_change_a_pixel(
    training, repeats, expected, world_size, workers, micro_batch
):
    settings = {"world_size": world_size, "workers": workers, "micro_batch": micro_batch}
    assert_same(load_rows(training, 0, STEPS, repeats=repeats, **settings), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_is_the_tail(training, repeats, expected, workers):
    tail = load_rows(training, 2, STEPS, repeats=repeats, workers=workers)
    assert_same(tail, of_steps(expected, 2, STEPS))


def test_world_size_and_micro_batch_may_change_at_any_step(training, repeats, expected):
    for start, (world_size, micro_batch) in enumerate([(2, 4), (3, 2), (1, 12), (5, 1)]):
        settings = {"repeats": repeats, "world_size": world_size, "micro_batch": micro_batch}
        rows = load_rows(training, start, start + 1, **settings)
        assert_same(rows, of_steps(expected, start, start + 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_split_may_be_replaced_before_loading(training, workers):
    def with_another_split(**settings):
        loader = training(**settings, workers=workers)
        loader.split = Split(12, 1, micro_batch=6)
        return loader

    assert [len(batch.rows) for batch in load(with_another_split(), 0, 2)] == [6] * 4
    assert_same(load_rows(with_another_split, 0, STEPS), load_rows(training, 0, STEPS))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 2), (1, 4), (3, 2), (5, 2)])
def test_a_steps_batches_hold_while_workers_run_ahead(training, world_size, workers):
    """Workers fill their few buffers again, but none of those that the training loop may still read."""
    place = {"world_size": world_size, "workers": workers}
    expected = [rows_in(batch) for batch in load(training(world_size=world_size), 0, 2 * STEPS)]
    loader = training(**place)
    loads, batches, addresses = loader.split.loads, loader.batches(0), set()
    for step in range(2 * STEPS):
        held = list(itertools.islice(batches, loads))
        time.sleep(0.1)  # enough for all batches that were asked for
        for batch, rows in zip(held, expected[step * loads : (step + 1) * loads], strict=True):
            assert_same(rows_in(batch), rows)
            addresses.add(batch.images.data_ptr())
    assert len(addresses) <= workers * BatchBuffers(loads, workers).buffers < 2 * STEPS * loads


WORLD_SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 12, 25]


def made_by_workers(loader, workers, count):
    """What torch's DataLoader does with requests, without its processes: worker w of W is given a copy of the data set
    and the requests w, w + W, ...
    """
    requests = list(itertools.islice(loader._requests(0), count))
    copies = [
        pickle.loads(pickle.dumps(_Training({None: loader.dataset}, BatchBuffers(1, 0))))
        for _ in range(max(1, workers))
    ]
    made = [None] * count
    for worker, copy in enumerate(copies):
        for place in range(worker, count, len(copies)):
            made[place] = copy[requests[place]]
    return made


def numbers_of(rows):
    """(step, row): the sample that is shown, by its pixels and its label."""
    shown = sample_numbers(torch.stack([image for image, _ in rows.values()])) if rows else []
    assert shown == [label for _, label in rows.values()]
    return dict(zip(rows, shown, strict=True))


def numbers_by_layout(order, global_batch, steps):
    """The same, computed from the order and the layout."""
    layout, rows = BatchLayout(global_batch), np.arange(global_batch)
    ids = {step: order.ids(layout.rows(step, rows)[0]).tolist() for step in range(steps)}
    return {(step, row): ids[step][row] for step in range(steps) for row in range(global_batch)}


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size"),
    [*itertools.product([96], [1, 10], [*WORLD_SIZES, 96]), *itertools.product([25], [4], WORLD_SIZES)],
)
def test_global_batches_are_the_same_at_any_world_size(numbered, world_size, workers, global_batch, micro_batch):
    """Every rank, for two steps of an epoch of 45; 25 rows leave one without a partner."""
    order, found = Order(45, seed=3), {}
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size}
        loader = TrainLoader(numbered[0], order, global_batch=global_batch, micro_batch=micro_batch, **place)
        for batch in made_by_workers(loader, workers, 2 * loader.split.loads):
            found |= numbers_of(rows_in(batch))
    assert found == numbers_by_layout(order, global_batch, 2)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (2, 3), (7, 2), (96, 3)])
def test_worker_processes_make_the_same_batches(numbered, world_size, workers):
    order = Order(45, seed=3)
    expected = numbers_by_layout(order, 96, 2)
    for rank in {0, world_size - 1}:
        place = {"rank": rank, "world_size": world_size, "workers": workers}
        loader = TrainLoader(numbered[0], order, global_batch=96, micro_batch=1, **place)
        found = {}
        for batch in load(loader, 0, 2):
            found |= numbers_of(rows_in(batch))
        assert found == {place: expected[place] for place in found}


def test_ids_are_asked_for_by_epochs_or_thousands(numbered, monkeypatch):
    """An id of a large call costs a tenth of one in a small call. A rank asks for its own rows only."""
    asked = []
    ids = Order.ids
    monkeypatch.setattr(Order, "ids", lambda self, positions: (asked.append(len(positions)), ids(self, positions))[1])

    def sizes_of_calls(**place):
        asked.clear()
        loader = TrainLoader(numbered[0], Order(45, seed=3), global_batch=12, micro_batch=4, **place)
        assert len(list(load(loader, 0, 30))) == 30 * loader.split.loads
        return set(asked)

    assert sizes_of_calls() == {48}
    assert sizes_of_calls(rank=1, world_size=3) == {16}
    assert sizes_of_calls(rank=0, world_size=5) == {8}, "two rows, and two of padding"
    monkeypatch.setattr("scalevit.data.loading.train_loader._IDS_AT_ONCE", 16)
    assert sizes_of_calls() == {24}


@pytest.mark.parametrize("world_sizes", [*zip(range(1, 8), range(1, 8), strict=True), (4, 3), (4, 7), (4, 8)])
@pytest.mark.parametrize(("global_batch", "steps", "repeats"), [(10, 9, 1), (9, 10, 1), (10, 27, 3), (18, 15, 3)])
def test_epochs_show_every_copy_of_every_sample_once(numbered, world_sizes, global_batch, steps, repeats):
    """Two epochs of 45 samples end with a step; in the first, the run is resumed with another number of ranks."""
    make = partial(TrainLoader, numbered[0], Order(45, seed=0), global_batch=global_batch, repeats=repeats)
    shown = {}
    for world_size, first, last in zip(world_sizes, (0, steps // 3), (steps // 3, steps), strict=True):
        shown |= numbers_of(load_rows(make, first, last, world_size, micro_batch=5))
    layout, rows = make(micro_batch=1).layout, np.arange(global_batch)
    by_epoch = [Counter(), Counter()]
    for step in range(steps):
        positions, copies = layout.rows(step, rows)
        for row in range(global_batch):
            by_epoch[positions[row] // 45][shown[step, row], int(copies[row])] += 1
    everything = dict.fromkeys(itertools.product(range(45), range(repeats)), 1)
    assert by_epoch == [everything, everything]


def test_steps_of_epochs(numbered):
    loader = TrainLoader(numbered[0], Order(45, seed=0), global_batch=10, micro_batch=5)
    assert loader.epoch_end_step(0) == 5
    assert loader.epoch_end_step(1) == loader.steps_in(2) == 9
    assert [loader.epoch_of(step) for step in (0, 4, 5, 8, 9)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch", [1, 4, 6, 18])
def test_copies_in_one_batch_are_decoded_once_and_kept_off_their_partners(
    numbered, monkeypatch, world_size, micro_batch
):
    decoded = []
    decode = ShardDataset._decode
    monkeypatch.setattr(ShardDataset, "_decode", lambda self, sample: (decoded.append(sample), decode(self, sample))[1])
    shown, decodes = [], 0
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size, "micro_batch": micro_batch}
        loader = TrainLoader(numbered[0], Order(45, seed=0), global_batch=18, repeats=3, **place)
        for batch in load(loader, 0, 5):
            numbers = list(numbers_of(rows_in(batch)).values())
            assert sorted(decoded) == sorted(set(numbers))
            assert all(one != other for one, other in zip(numbers[0::2], numbers[1::2], strict=True))
            shown += numbers
            decodes += len(decoded)
            decoded.clear()
    assert sorted(Counter(shown).values()) == [3] * 30
    if world_size in (1, 3) and micro_batch >= 6:  # whole lanes: all copies of an image are in one batch
        assert decodes == 30


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_copies_differ(dataset, micro_batch):
    """Three rows, three copies of the same image, in two batches or one."""
    make = partial(TrainLoader, dataset, Order(23, seed=9), global_batch=3, repeats=3)
    images, labels = zip(*load_rows(make, 0, 1, micro_batch=micro_batch).values(), strict=True)
    assert len(set(labels)) == 1
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(images, 2))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("world_size", [1, 5])
def test_generators_of_the_training_process_are_left_alone(training, workers, world_size):
    """Rank 0 of 5 also has a batch of padding, whose shape an augmented image gives."""

    def draw():
        return torch.rand(3).tolist(), np.random.rand(), random.random()

    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = draw()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    assert list(load(training(workers=workers, world_size=world_size), 0, 1))
    assert draw() == expected


def test_settings_that_do_not_fit(training):
    assert training(rank=11, world_size=12).split.loads == 1
    with pytest.raises(SettingError, match=r"^global_batch = 12: must be at least the 13 ranks"):
        training(rank=0, world_size=13)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 1), (3, 0), (4, 0), (5, 2)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_bad_samples_are_replaced_alike_on_all_ranks_and_listed(damaged, world_size, workers, repeats):
    def run(world_size, workers):
        seen, faults = {}, []
        for rank in range(world_size):
            place = {"rank": rank, "world_size": world_size, "workers": workers}
            loader = TrainLoader(
                damaged[0], Order(20, seed=1), global_batch=12, micro_batch=3, repeats=repeats, **place
            )
            for batch in load(loader, 0, 5 * repeats):
                seen |= rows_in(batch)
                faults += batch.faults
        return seen, Counter(faults)

    expected, expected_faults = run(1, 0)
    seen, faults = run(world_size, workers)
    assert_same(seen, expected)
    assert not {3, 8, 9} & set(numbers_of(seen).values())
    assert {fault.key for fault in faults} == {"bad3", "bad8", "bad9"}
    # 60 positions, three epochs, for every repeat once: in each all bad ones came up. Batches that share the copies of
    # an image both list it.
    assert min(faults.values()) >= 3
    if repeats == 1:
        assert faults == expected_faults


def test_requests_name_upcoming_samples():
    def requests():
        for number in range(100):
            samples = np.array([number])
            yield _Request(number, samples, samples, samples, samples, image_size=8)

    upcoming = [request.upcoming.tolist() for request in itertools.islice(with_lookahead(requests(), 4), 6)]
    assert upcoming == [[1, 2, 3, 4], [5], [6], [7], [8], [9]]


def test_a_differing_fingerprint_is_refused_with_the_difference(dataset, training):
    first = training().fingerprint
    check_fingerprint(first, training(rank=1, world_size=5, workers=1, micro_batch=4).fingerprint, "checkpoint X")
    for loader, message in (
        (TrainLoader(dataset, Order(23, seed=8), global_batch=12, micro_batch=2), r"\(seed: 9 there, 8 now\)"),
        (training(repeats=3), r"\(data.augmentation.aug_repeats: 1 there, 3 now\)"),
        (training(global_batch=10), r"\(global_batch: 12 there, 10 now\)"),
    ):
        with pytest.raises(UserError, match=f"^checkpoint X: .*{message}") as caught:
            check_fingerprint(first, loader.fingerprint, "checkpoint X", {"repeats": "data.augmentation.aug_repeats"})
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"training shards: .* there, 0123 now"):
        check_fingerprint(first, first | {"index": "0123"}, "checkpoint X")
    with pytest.raises(UserError, match="number of training samples: 23 there, 24 now"):
        check_fingerprint(first, first | {"samples": 24, "order": "x"}, "checkpoint X")


def test_a_run_with_another_layout_is_refused(training):
    present = training().fingerprint
    without = {name: value for name, value in present.items() if name != "layout"}
    for saved, message in ((present | {"layout": 1}, "1 there, 2 now"), (without, "none there, 2 now")):
        with pytest.raises(UserError, match=rf"\(version of the batches' layout: {message}\)"):
            check_fingerprint(saved, present, "checkpoint X")
