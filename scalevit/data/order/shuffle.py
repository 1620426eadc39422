"""The order in which samples are seen: a stateless function from a position to a sample.

Positions are integers that increase over a whole run: epoch = position // length, place = position % length. Within an
epoch the order is a bijection that is computed for any place directly and without memory, so one integer is enough to
resume, and the order does not depend on the world size. Knows numpy; must not know files, ranks or batches.

Large sets are shuffled such that reads stay near-sequential: the ids are cut into chunks of neighbours, the chunks are
permuted, that stream is cut into lanes (place p takes from lane p % LANES), and each lane is permuted within windows
of several chunks. A rank whose world size divides LANES always reads from its own lanes. The border between two lanes
usually cuts a chunk, so the lanes of one node are neighbours in the stream: few chunks are read by two nodes.
"""

import hashlib

import numpy as np

from scalevit.randomness import hash64, mix64

LANES = 96
CHUNK = 128
WINDOW = 64 * CHUNK
# Smaller sets are shuffled sample by sample, which is the better shuffle: their shards stay in the page cache.
SMALL = 4 * WINDOW
_ROUNDS = 6
# Neighbours in the stream are equal modulo as many of these as possible: node n of N takes the lanes n modulo N.
_NODE_COUNTS = (2, 4, 8, 16, 48)


class Order:
    """The order of `length` samples under `seed`.

    Args:
        length: number of samples, at least 1.
        seed: any integer; another seed gives another order.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"an order needs at least one sample, not {length}")
        self.length = length
        self.seed = seed
        lanes = np.arange(LANES)
        self._lane_lengths = length // LANES + (lanes < length % LANES)
        stream = lanes_in_stream_order(LANES)
        self._lane_starts = np.empty(LANES, np.int64)
        self._lane_starts[stream] = np.cumsum(self._lane_lengths[stream]) - self._lane_lengths[stream]

    def __len__(self) -> int:
        return self.length

    @property
    def fingerprint(self) -> str:
        """16 hex digits of everything that the order depends on."""
        settings = f"order 2: length {self.length} seed {self.seed} {LANES} {CHUNK} {WINDOW} {SMALL} {_ROUNDS}"
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """The samples at positions.

        Args:
            positions: (n,) int64, not negative, in any order and from any number of epochs.

        Returns:
            (n,) int64 ids in 0..length-1; the `length` positions of an epoch have each id once.
        """
        positions = np.asarray(positions, np.int64)
        ids = np.empty_like(positions)
        epochs, places = np.divmod(positions, self.length)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._ids_of_epoch(int(epoch), places[here])
        return ids

    def _ids_of_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if self.length < SMALL:
            return permute(places, self.length, _keys(self.seed, epoch, 0))
        # 1. The lane of each place, its offset in the lane, and the window of that offset.
        lanes, offsets = places % LANES, places // LANES
        windows = offsets // WINDOW
        starts = windows * WINDOW
        widths = np.minimum(WINDOW, self._lane_lengths[lanes] - starts)
        # 2. A permutation within each window, with different keys.
        names = (lanes.astype(np.uint64) << np.uint64(40)) | windows.astype(np.uint64)
        keys = mix64(_keys(self.seed, epoch, 1) ^ mix64(names)[:, None])
        shuffled = np.empty_like(offsets)
        for width in np.unique(widths):
            here = widths == width
            shuffled[here] = permute((offsets - starts)[here], int(width), keys[here])
        # 3. From the slot in the stream of permuted chunks to the sample. The last, shorter chunk stays last, so the
        #    stream is rotated by a keyed amount: otherwise its samples would be in the same lane in every epoch.
        slots = (self._lane_starts[lanes] + starts + shuffled + hash64(self.seed, epoch, 2) % self.length) % self.length
        chunks, within = np.divmod(slots, CHUNK)
        count = self.length // CHUNK
        whole = chunks < count
        chunks[whole] = permute(chunks[whole], count, _keys(self.seed, epoch, 3))
        return chunks * CHUNK + within


def lanes_in_stream_order(count: int) -> np.ndarray:
    """(count,) int64: the numbers 0..count-1 such that those of one node, for common numbers of nodes, are neighbours.

    Args:
        count: a divisor of `LANES`; lane l of `count` consists of the lanes l modulo `count`.
    """
    lanes = np.arange(count)
    return np.lexsort((lanes, *(lanes % nodes for nodes in reversed(_NODE_COUNTS))))


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A keyed bijection of 0..size-1: a Feistel network on the next power of four, with cycle walking.

    Args:
        values: (n,) int64 in 0..size-1.
        size: of the permuted range.
        keys: (rounds,) uint64 for all values, or (n, rounds) for each value.

    Returns:
        (n,) int64.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.broadcast_to(keys, (len(values), keys.shape[-1]))
    permuted = values.astype(np.uint64)
    outside = np.arange(len(values)) if size > 1 else np.arange(0)
    while len(outside):
        left, right = permuted[outside] >> half, permuted[outside] & mask
        for round_keys in keys[outside].T:
            left, right = right, (left ^ mix64(right ^ round_keys)) & mask
        permuted[outside] = (left << half) | right
        outside = outside[permuted[outside] >= np.uint64(size)]
    return permuted.astype(np.int64)


def permutation(length: int, seed: int) -> np.ndarray:
    """(length,) int64: 0..length-1 in a shuffled order that does not depend on the numpy version."""
    return permute(np.arange(length), length, _keys(seed, 0, 4))


def _keys(seed: int, epoch: int, purpose: int) -> np.ndarray:
    return np.array([hash64(seed, epoch, purpose, index) for index in range(_ROUNDS)], np.uint64)
