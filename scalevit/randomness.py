"""Random numbers as functions of where they are used; there is no random state that a run carries along.

A sample's pixels follow from (seed, position, copy). What is drawn on the device follows from (seed, purpose, step, row
of the global batch). So neither ranks nor micro-batches, workers or restarts change a number. Knows integers and the
three generators that transforms draw from; must not know images, orders or loaders.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014), elementwise.

    Args:
        values: uint64, any shape but a scalar (numpy warns when scalars wrap around).
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash64(*integers: int) -> int:
    """One 64-bit number from several integers. It must never change: checkpoints depend on the orders made from it."""
    state = 0x9E3779B97F4A7C15
    for integer in integers:
        state = (state ^ (int(integer) & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def seed_sample(seed: int, position: int, copy: int) -> None:
    """Seeds `random`, numpy's and torch's CPU generator for one augmented copy of the sample at an order position."""
    import torch

    value = hash64(seed, position, copy)
    random.seed(value)
    np.random.seed([value & 0xFFFFFFFF, value >> 32])
    # torch.manual_seed would also seed every accelerator, which belongs to the training process.
    torch.default_generator.manual_seed(value)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restores the three generators after the block: without workers they are the training process's own."""
    import torch

    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class Purpose(IntEnum):
    """What numbers are drawn for: the same row of the same step has independent numbers for each."""

    MIXING = 1
    ERASING = 2
    DROPPING = 3
    STEP_DROPPING = 4
    """In what all rows of a step have in common."""
    PROJECTION = 5
    WIDTHS = 6
    IMAGE_SIZE = 7


def row_keys(seed: int, purpose: Purpose, step: int, rows: np.ndarray) -> np.ndarray:
    """One key for each row of a step, from which any number of draws follow.

    Args:
        seed: of the run.
        purpose: of the draws.
        step: number of the optimizer step.
        rows: (n,) int64, numbers of the rows in the global batch; padding may have any.

    Returns:
        (n,) uint64.
    """
    return mix64(rows.astype(np.uint64) * _GOLDEN + np.uint64(hash64(seed, int(purpose), step)))


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """Independent numbers in [0, 1) for each key: the splitmix64 sequence that begins at it.

    Args:
        keys: (n,) uint64.
        count: of each key.

    Returns:
        (n, count) float64, multiples of 2^-53.
    """
    counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return (mix64(keys[:, None] + counters) >> np.uint64(11)) * 2.0**-53
