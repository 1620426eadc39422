"""timm's RepeatAugSampler, and the rows of our steps in its order."""

import itertools
from functools import partial

import numpy as np
import pytest
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data.distributed import DistributedSampler

from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.train_loader import TrainLoader
from scalevit.data.order.timm_order import TimmLayout, TimmOrder
from scalevit.data.transforms.base import TrainingAugmentation
from scalevit.data.transforms.timm_pipeline import TimmTraining
from scalevit.errors import SettingError


def timms_images(samples, *, repeats, processes, epoch):
    """For each process, the images of an epoch in turn."""
    for rank in range(processes):
        place = {"num_replicas": processes, "rank": rank}
        repeated = RepeatAugSampler(range(samples), num_repeats=repeats, **place)
        sampler = DistributedSampler(range(samples), **place) if repeats == 1 else repeated
        sampler.set_epoch(epoch)
        yield list(sampler)


@pytest.mark.parametrize(
    ("samples", "repeats", "processes", "group", "global_batch"),
    [(1000, 3, 2, 16, 64), (1000, 3, 1, 16, 48), (1000, 2, 4, 8, 32), (100, 3, 2, 4, 8), (1001, 1, 2, 16, 32)],
)
def test_groups_are_the_batches_of_timms_processes(samples, repeats, processes, group, global_batch):
    """Group k of a step is what process k modulo their number loads for a forward pass; an epoch has as many steps."""
    layout = TimmLayout(global_batch, repeats, samples, group, processes)
    order, steps = TimmOrder(samples), layout.steps_in(1, samples)
    for epoch in (0, 2):
        images = list(timms_images(samples, repeats=repeats, processes=processes, epoch=epoch))
        assert steps == len(images[0]) * processes // global_batch
        shown = set()
        for step in range(steps):
            positions, copies = layout.rows(epoch * steps + step, np.arange(global_batch))
            shown |= set(zip(positions.tolist(), copies.tolist(), strict=True))
            ids = order.ids(positions).tolist()
            for number in range(global_batch // group):
                own = ids[number * group : (number + 1) * group]
                start = (step * global_batch // group + number) // processes * group
                assert [*own[0::2], *own[1::2][::-1]] == images[number % processes][start : start + group]
        assert len(shown) == steps * global_batch, "no copy is shown twice in an epoch"


def test_groups_need_not_divide_the_batch_of_one_process():
    layout, order = TimmLayout(40, 3, 700, 16), TimmOrder(700)
    images = next(timms_images(700, repeats=3, processes=1, epoch=0))
    for step in range(layout.steps_in(1, 700)):
        positions, _ = layout.rows(step, np.arange(40))
        assert sorted(order.ids(positions)) == sorted(images[40 * step : 40 * (step + 1)])


def test_epochs_end_with_a_step():
    layout = TimmLayout(64, 3, 1000, 16, 2)
    steps = layout.steps_in(1, 1000)
    assert steps == 768 // 64
    assert [layout.epoch_of(step, 1000) for step in (0, steps - 1, steps, 5 * steps)] == [0, 0, 1, 5]
    assert [layout.epoch_end_step(epoch, 1000) for epoch in (0, 4)] == [steps, layout.steps_in(5, 1000)]


def test_the_papers_run_has_its_steps():
    """Two GPUs with 256 images and an accumulation of two: 1,251 steps per epoch, 375,300 in 300 epochs."""
    assert TimmLayout(1024, 3, 1_281_167, 256, 2).steps_in(300, 1_281_167) == 375_300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((48, 3, 1000, 16, 2), r"^repeat_processes = 2: the global batch of 48 must be a multiple of 32, "),
        ((280, 3, 300, 4, 1), r"^global_batch = 280: is more than the 256 images of an epoch in timm's order"),
    ],
    ids=["processes", "batch"],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(SettingError, match=message):
        TimmLayout(*arguments)


def test_neither_ranks_nor_a_restart_change_a_row(index):
    """Two steps an epoch, so that later epochs begin in the steps that are loaded."""
    transform = TimmTraining(TrainingAugmentation(image_size=8, mean=(0.5, 0.5, 0.5), auto_augment="rand-m9"))
    make = partial(
        TrainLoader,
        ShardDataset(index, transform, seed=7),
        TimmOrder(23),
        global_batch=8,
        repeats=3,
        layout=TimmLayout(8, 3, 23, 4, 2),
    )
    whole = rows_of(make, 0, 5, world_size=1, micro_batch=8)
    assert list(whole) == [(step, row) for step in range(5) for row in range(8)]
    assert rows_of(make, 0, 5, world_size=3, micro_batch=2) == whole
    resumed = rows_of(make, 3, 5, world_size=2, micro_batch=4)
    assert resumed == {place: row for place, row in whole.items() if place[0] >= 3}
    assert make(micro_batch=8).fingerprint["layout"] == "timm 1, 2 processes, groups of 4"


def rows_of(make, start, stop, *, world_size, **settings):
    found = {}
    for rank in range(world_size):
        loader = make(rank=rank, world_size=world_size, **settings)
        for batch in itertools.islice(loader.batches(start), (stop - start) * loader.split.loads):
            for row, image, label in zip(batch.rows.tolist(), batch.images, batch.labels.tolist(), strict=True):
                if row >= 0:
                    found[batch.step, row] = image.numpy().tobytes(), label
    return dict(sorted(found.items()))
