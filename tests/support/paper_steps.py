"""The twenty steps that the paper's code and ours are compared by: weights, batches, and what is kept of the result.

Everything is a formula in whole numbers, so that recorded results hold for other versions of torch and numpy. Knows
numpy; `paper_code.py` runs the paper's code on it, tests/training/test_paper_steps.py ours.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

STRATEGIES = ("baseline", "grouped", "shallow", "thin")
STEPS, EPOCHS, WARMUP_EPOCHS = 20, 5, 2
MICRO_BATCHES, ROWS = 2, 4
"""Of a step, and rows of each: what is mixed alike."""
CLASSES, SIDE = 10, 16
SMALL = {"patch_size": 8, "embed_dim": 32, "num_heads": 2}
"""Of ViT-B/16; its 12 blocks stay, which the paper's code needs."""
WARMUP_LR, EMA_DECAY = 5e-4, 0.95
"""With the paper's 1e-5 and 0.9998 it would not show in twenty steps how an average starts and decays."""


class FixedBatch(NamedTuple):
    """A micro-batch of the paper's loader: image j is mixed with the j-th from the end."""

    images: np.ndarray
    """(ROWS, 3, SIDE, SIDE) float32."""
    labels: np.ndarray
    """(ROWS,) int64."""
    weight: float
    """Of an image's own label."""


def batches(step: int) -> Iterator[FixedBatch]:
    """The micro-batches of a step."""
    for index in range(MICRO_BATCHES):
        name = f"step {step}, micro-batch {index}"
        labels = (_uniform(f"labels of {name}", (ROWS,)) + 1) / 2 * CLASSES
        weight = 1.0 if step % 5 == 4 else float(0.5 + 0.4 * _uniform(f"weight of {name}", (1,))[0])
        images = 2 * _uniform(f"images of {name}", (ROWS, 3, SIDE, SIDE))
        yield FixedBatch(images.astype(np.float32), labels.astype(np.int64), weight)


def initial_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter's, float32; large enough that every part of the model matters."""
    values = _uniform(name, shape)
    if len(shape) > 1:
        values *= (3 / np.prod(shape[1:])) ** 0.5  # outputs of variance 1, as if for inputs of variance 1
    else:
        values = 0.2 * values + float("norm" in name and name.endswith("weight"))
    return values.astype(np.float32)


def record(averages: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Of each tensor of an EMA its norm and two of its values.

    Biases of keys are left out: they change no result, so that their gradient is rounding noise, which AdamW divides
    by its own size.
    """
    kept = {}
    for name, tensor in averages.items():
        values = tensor.astype(np.float64).ravel()
        if name.endswith("qkv.bias"):
            values = np.delete(values, np.s_[len(values) // 3 : 2 * len(values) // 3])
        places = len(values) // 4, 3 * len(values) // 4
        kept[name] = [round(float(value), 7) for value in (np.linalg.norm(values), *(values[i] for i in places))]
    return kept


def _uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values in [-1, 1), float64, that follow from a name: splitmix64 of its checksum and the index."""
    count = int(np.prod(shape))
    bits: Any = np.arange(count, dtype=np.uint64) + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32))
    bits = bits * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = bits ^ (bits >> np.uint64(31))
    return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0).reshape(shape)
