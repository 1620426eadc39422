"""Some samples of another source, and how a set is split in two."""

from collections.abc import Sequence

import numpy as np

from scalevit.data.writing.sources.base import LeftOut, Sample, Source, short_digest


class SubsetSource:
    """Samples of another source.

    Args:
        source: of all samples.
        numbers: which of them.
    """

    left_out: Sequence[LeftOut] = ()

    def __init__(self, source: Source, numbers: np.ndarray) -> None:
        self._source, self._numbers, self.classes = source, numbers, source.classes

    def __len__(self) -> int:
        return len(self._numbers)

    def load(self, number: int) -> Sample:
        return self._source.load(int(self._numbers[number]))

    def origin(self, number: int) -> str:
        return self._source.origin(int(self._numbers[number]))

    def fingerprint(self) -> str:
        return short_digest([self._source.fingerprint(), self._numbers.astype("<i8").tobytes().hex()])


def stratified(labels: np.ndarray, contents: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """Chooses the same share of every class, and puts images that are equal on one side.

    A class gives at least one image to either side if it has two that differ, so that of few images more or less than
    the share may be chosen.

    Args:
        labels: (N,) integers.
        contents: (N,) integers, equal for equal images; all different where nothing is known.
        share: of each class that is chosen, between 0 and 1.
        seed: of the choice.

    Returns:
        (N,) bool, what is chosen.
    """
    _, first, group, size = np.unique(contents, return_index=True, return_inverse=True, return_counts=True)
    label = labels[first]
    order = np.random.default_rng(seed).permutation(len(first))
    order = order[np.argsort(label[order], kind="stable")]
    chosen = np.zeros(len(first), bool)
    for groups in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
        images = np.cumsum(size[groups])
        count = int(np.searchsorted(images, round(share * images[-1]), "right"))
        chosen[groups[: min(max(count, 1), len(groups) - 1)]] = True
    return chosen[group]
