"""What reading a set costs each node: reads, cache and index, before any node is rented.

Nothing is estimated that can be counted: the order of one epoch (for very large sets, of its first windows) is computed
and the chunks that each node needs are counted. Knows the order and sizes; must not read shards.
"""

from dataclasses import dataclass

import numpy as np

from scalevit.data.order.batching import BatchLayout
from scalevit.data.order.shuffle import CHUNK, LANES, WINDOW, Order

# Maximum number of positions to compute: two windows of every lane, which the other windows resemble.
_MAX_POSITIONS = max(4_000_000, 2 * LANES * WINDOW)
INDEX_BYTES_PER_SAMPLE = 37


@dataclass(frozen=True)
class ReadPlan:
    """Cost of reading one epoch."""

    samples: int
    total_bytes: int
    nodes: int
    index_bytes: int
    """On disk, and in each process."""
    chunks: int
    chunk_bytes: int
    """Of an average chunk, which is one read from an object store."""
    reads_per_node: int
    """Chunks that the busiest node fetches in an epoch, if its cache holds `cache_bytes`."""
    cache_bytes: int
    """Size of the busiest node's cache such that no chunk is fetched twice in an epoch."""
    amplification: float
    """Reads of all nodes over the number of chunks."""


def plan_reads(samples: int, total_bytes: int, *, nodes: int, global_batch: int, seed: int = 0) -> ReadPlan:
    """Counts what each node reads in the first epoch.

    Args:
        samples: of the set.
        total_bytes: of all images.
        nodes: number of nodes that train, each with the same number of ranks.
        global_batch: images of a step.
        seed: of the order, which hardly changes the result.
    """
    positions = np.arange(min(samples, _MAX_POSITIONS))
    chunks = Order(samples, seed).ids(positions) // CHUNK
    # Nodes take the rows of a step in turn; the first step shows which positions these are in every step.
    node_of_place = np.empty(global_batch, np.int64)
    node_of_place[BatchLayout(global_batch).rows(0, np.arange(global_batch))[0]] = (
        np.arange(global_batch) * nodes // global_batch
    )
    nodes_of = node_of_place[positions % global_batch]
    per_node = [_chunks_of_node(chunks[nodes_of == node]) for node in range(nodes) if (nodes_of == node).any()]
    counts = [count for count, _ in per_node]
    total = len(np.unique(chunks))
    all_chunks = -(-samples // CHUNK)
    chunk_bytes = round(total_bytes / samples * min(CHUNK, samples))
    return ReadPlan(
        samples=samples,
        total_bytes=total_bytes,
        nodes=nodes,
        index_bytes=samples * INDEX_BYTES_PER_SAMPLE,
        chunks=all_chunks,
        chunk_bytes=chunk_bytes,
        reads_per_node=round(max(counts) * all_chunks / total),
        cache_bytes=max(needed for _, needed in per_node) * chunk_bytes,
        amplification=sum(counts) / total,
    )


def _chunks_of_node(chunks: np.ndarray) -> tuple[int, int]:
    """How many chunks a node reads, and how many of them it needs at the same time.

    Args:
        chunks: (n,) the chunk of each of its positions, in order.
    """
    distinct, first = np.unique(chunks, return_index=True)
    last = len(chunks) - 1 - np.unique(chunks[::-1], return_index=True)[1]
    changes = np.zeros(len(chunks) + 1, np.int64)
    np.add.at(changes, first, 1)
    np.add.at(changes, last + 1, -1)
    return len(distinct), int(changes.cumsum().max())
