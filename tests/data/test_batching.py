"""The rows of a global batch, and how ranks and micro-batches share them."""

import itertools

import numpy as np
import pytest

from scalevit.data.order.batching import PADDING, BatchLayout, Split
from scalevit.errors import SettingError

SIZES = [(64, 1), (64, 3), (1024, 3), (1024, 1), (1000, 3), (96, 4), (24, 2), (6, 3), (10, 1), (63, 3), (7, 1), (1, 1)]


@pytest.mark.parametrize(("global_batch", "repeats"), SIZES)
def test_every_image_is_shown_in_each_copy_once(global_batch, repeats):
    """As many steps as give whole images; within a step, positions advance by a step's share."""
    layout = BatchLayout(global_batch, repeats)
    shown = set()
    for step in range(2 * repeats):
        positions, copies = layout.rows(step, np.arange(global_batch))
        rows = set(zip(positions.tolist(), copies.tolist(), strict=True))
        assert len(rows) == global_batch
        assert not rows & shown
        shown |= rows
    expected = set(itertools.product(range(2 * global_batch), range(repeats)))
    assert shown == expected


@pytest.mark.parametrize(("global_batch", "repeats"), SIZES)
def test_partners_are_never_copies_of_one_image(global_batch, repeats):
    layout = BatchLayout(global_batch, repeats)
    pairs = global_batch // 2
    for step in range(2 * repeats):
        positions, _ = layout.rows(step, np.arange(2 * pairs))
        own, partner = positions.reshape(pairs, 2).T
        if global_batch >= 2 * repeats:
            assert (own != partner).all()


def test_neighbouring_rows_come_from_few_images():
    """One decode serves the copies: 64 rows with 3 repeats have hardly more than 64 / 3 images."""
    layout = BatchLayout(1024, 3)
    for step in range(3):
        for start in range(0, 1024, 64):
            positions, _ = layout.rows(step, np.arange(start, start + 64))
            assert len(np.unique(positions)) <= 64 / 3 + 4


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
def test_the_ranks_of_a_node_read_from_the_same_lanes(world_size):
    """Ranks share the step in contiguous ranges: those of half of the ranks have half of the lanes."""
    layout, split = BatchLayout(1024, 3), Split(1024, world_size, 64)
    for half in (0, 1):
        ranks = range(half * world_size // 2, (half + 1) * world_size // 2)
        rows = np.concatenate([load.rows for rank in ranks for load in split.of_rank(rank, 5)])
        positions, _ = layout.rows(5, rows)
        assert set(positions % 2) == {half}


@pytest.mark.parametrize("global_batch", [1, 7, 24, 64, 100])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 16, 64, 1000])
def test_ranks_and_micro_batches_share_the_rows(global_batch, micro_batch):
    for world_size in {1, 2, 3, 4, 5, 7, 8, global_batch} & set(range(1, global_batch + 1)):
        split = Split(global_batch, world_size, micro_batch)
        assert split.size <= micro_batch
        assert split.size * split.accumulation == split.loads * split.loaded_rows
        seen, padding = [], 0
        for rank in range(world_size):
            loads = list(split.of_rank(rank, 3))
            assert len(loads) == split.loads
            for load in loads:
                assert load.step == 3
                assert len(load.rows) == split.loaded_rows
                real = load.rows[load.rows != PADDING]
                assert (load.rows[: len(real)] == real).all(), "padding comes last"
                assert not len(real) or real[0] % 2 == 0, "pairs stay whole"
                seen += real.tolist()
                padding += split.loaded_rows - len(real)
        assert seen == list(range(global_batch)), "in the order of the ranks"
        assert padding == split.padding


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "size", "accumulation", "padding"),
    [
        (8, 256, 128, 1, 0),
        (1, 256, 256, 4, 0),
        (16, 256, 64, 1, 0),
        (3, 256, 172, 2, 8),
        (7, 64, 50, 3, 26),
        (1, 1, 1, 1024, 0),
    ],
)
def test_few_rows_are_padding(world_size, micro_batch, size, accumulation, padding):
    split = Split(1024, world_size, micro_batch)
    assert (split.size, split.accumulation, split.padding) == (size, accumulation, padding)


def test_more_ranks_than_rows_are_refused():
    with pytest.raises(SettingError, match=r"global_batch = 8: must be at least the 9 ranks"):
        Split(8, 9, 4)


def test_epochs_have_as_many_images_as_the_set():
    """45 samples in batches of 10: the first epoch ends within step 4, the second with step 8."""
    layout = BatchLayout(10)
    assert [layout.epoch_end_step(epoch, samples=45) for epoch in range(4)] == [5, 9, 14, 18]
    assert [layout.steps_in(epochs, samples=45) for epochs in (1, 2, 3)] == [5, 9, 14]
    assert [layout.epoch_of(step, samples=45) for step in range(11)] == [0] * 5 + [1] * 4 + [2] * 2
    for epoch in range(20):  # an epoch begins in the step in which the one before ends, or after it
        end = layout.epoch_end_step(epoch, samples=45)
        assert layout.epoch_of(end - 1, samples=45) == epoch
        assert layout.epoch_of(end, samples=45) == epoch + 1
