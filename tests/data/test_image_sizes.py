"""The sizes of steps: timm's probabilities, and draws that follow from the seed and the step."""

import numpy as np
import pytest
from timm.data.scheduled_sampler import ScheduledBatchSampler

from scalevit.data.order.image_sizes import ImageSizes

SIDES = (128, 160, 192, 224)
STEPS = 1500


@pytest.mark.parametrize(
    ("weights", "progressive", "spread", "mix", "epoch"),
    [
        (None, False, 0.65, 0.1, 0),
        ((4, 0, 1, 3), False, 0.65, 0.1, 7),
        ((4, 0, 1, 3), True, 0.65, 0.1, 0),
        (None, True, 0.3, 0.4, 5),
        (None, True, 1.5, 0.0, 9),
        (None, True, 0.0, 0.2, 30),
    ],
    ids=["equal", "weighted", "first epoch", "half-way", "last epoch", "later"],
)
def test_shares_are_timms(weights, progressive, spread, mix, epoch):
    """Of many steps, against the weights of timm's sampler as its trainer makes it for 10 epochs."""
    schedule = {"schedule_epochs": 10, "schedule_spread": spread, "schedule_random_mix": mix}
    choice = "progressive" if progressive else "constant"
    timms = ScheduledBatchSampler(range(1000), [8] * 4, choice_weights=weights, choice_schedule=choice, **schedule)
    expected = timms.choice_weights_for_epoch(epoch).numpy()
    sizes = ImageSizes(SIDES, weights, progressive=progressive, epochs=10, spread=spread, random_mix=mix, seed=5)
    np.testing.assert_array_equal(sizes.probabilities(epoch), expected)
    drawn = [sizes.of_step(step, epoch) for step in range(STEPS)]
    shares = np.array([drawn.count(side) for side in SIDES]) / STEPS
    # Four standard deviations of a binomial share; 0 where the probability is.
    assert (abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / STEPS)).all()


def test_a_size_follows_from_seed_and_step():
    def drawn(seed: int) -> list[int]:
        return [ImageSizes(SIDES, seed=seed).of_step(step, 0) for step in range(64)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len(set(drawn(1)[:16])) == 4, "neighbouring steps are independent"
