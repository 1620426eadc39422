"""Integer hashes and the random state of one sample.

A sample's pixels are determined by (seed, position, copy), whatever worker or rank computes them. Knows integers and
the three generators that transforms draw from; must not know images, orders or loaders.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

_MASK = (1 << 64) - 1


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
