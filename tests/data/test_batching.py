import itertools

import numpy as np
import pytest

from scalevit.data.order.batching import BatchLayout
from scalevit.errors import SettingError


def test_without_repeats_ranks_stride_through_the_positions():
    layout = BatchLayout(global_batch=24, micro_batch=4)
    for world_size in (1, 2, 3, 6):
        for rank in range(world_size):
            seen = list(itertools.islice(layout.of_rank(rank, world_size, start_step=5), 2 * 6 // world_size))
            for rows in seen:
                assert set(rows.positions % world_size) == {rank}
            positions = np.concatenate([rows.positions for rows in seen])
            np.testing.assert_array_equal(np.sort(positions), np.arange(5 * 24, 7 * 24)[rank::world_size])


def test_steps_and_numbers_come_in_order():
    seen = itertools.islice(BatchLayout(24, 4).of_rank(1, 3, start_step=7), 5)
    assert [(rows.step, rows.number) for rows in seen] == [(7, 1), (7, 4), (8, 1), (8, 4), (9, 1)]


@pytest.mark.parametrize("micro_batch", [6, 7, 8, 10])
def test_repeats_show_each_position_that_often_and_never_mirrored(micro_batch):
    repeats, count = 3, 4
    layout = BatchLayout(count * micro_batch, micro_batch, repeats)
    shown = set()
    for step in range(6):
        for number in range(count):
            rows = layout.micro_batch_at(step, number)
            assert set(rows.positions % count) == {number}
            pairs = list(zip(rows.positions.tolist(), rows.copies.tolist(), strict=True))
            assert not shown & set(pairs)
            shown |= set(pairs)
            if micro_batch % 2 == 0:
                assert (rows.positions != rows.positions[::-1]).all()
            # Copies are neighbours in the slots, so one decode serves them but where a step cuts them.
            assert len(np.unique(rows.positions)) <= -(-micro_batch // repeats) + 1
    expected = {(position, copy) for position in range(6 * micro_batch * count // repeats) for copy in range(repeats)}
    assert shown == expected


@pytest.mark.parametrize(
    ("settings", "world_size", "hint"),
    [
        ((1024, 256), 3, "use 768"),
        ((1024, 256), 8, "use 2048 or micro_batch = 128"),
        ((6, 6), 4, "use 24"),
    ],
)
def test_what_cannot_be_shared_says_what_can(settings, world_size, hint):
    with pytest.raises(SettingError, match=f"{world_size} ranks: {hint}$") as caught:
        BatchLayout(*settings).accumulation(world_size)
    assert "\n" not in str(caught.value)
    assert (caught.value.argument, caught.value.value) == ("global_batch", settings[0])


def test_a_step_is_whole_micro_batches():
    with pytest.raises(SettingError, match=r"global_batch = 10: not a multiple of micro_batch = 4"):
        BatchLayout(10, 4)


def test_epochs_have_as_many_images_as_the_set():
    """45 samples in batches of 10: the first epoch ends within step 4, the second with step 8."""
    layout = BatchLayout(10, 5)
    assert [layout.epoch_end_step(epoch, samples=45) for epoch in range(4)] == [5, 9, 14, 18]
    assert [layout.steps_in(epochs, samples=45) for epochs in (1, 2, 3)] == [5, 9, 14]
    assert [layout.epoch_of(step, samples=45) for step in range(11)] == [0] * 5 + [1] * 4 + [2] * 2
    for epoch in range(20):  # an epoch begins in the step in which the one before ends, or after it
        end = layout.epoch_end_step(epoch, samples=45)
        assert layout.epoch_of(end - 1, samples=45) == epoch
        assert layout.epoch_of(end, samples=45) == epoch + 1
