"""`scalevit shards plan`: what reading a set will cost each node, before anybody rents the nodes.

Nothing is estimated that can be counted: the order is laid out for one epoch (or its first windows, for very large
sets) and the chunks that each node needs are counted. Knows the order and sizes; must not read shards.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from scalevit.data.order.batching import spread_rank
from scalevit.data.order.shuffle import CHUNK, LANES, WINDOW, Order
from scalevit.errors import UserError

# Positions that are laid out at most; two windows of all lanes tell what the others will be like.
_MOST_POSITIONS = max(4_000_000, 2 * LANES * WINDOW)
INDEX_BYTES_PER_SAMPLE = 37


@dataclass(frozen=True)
class Plan:
    """Cost of an epoch."""

    samples: int
    total_bytes: int
    nodes: int
    index_bytes: int
    chunks: int
    chunk_bytes: int
    """Of a typical chunk, which is one read from an object store."""
    reads_per_node: int
    """Chunks that a node fetches in an epoch, if its cache holds `cache_bytes`; of the busiest node."""
    cache_bytes: int
    """What the busiest node's cache must hold, so that no chunk is fetched twice in an epoch."""
    amplification: float
    """Reads of all nodes over the chunks there are."""

    def lines(self) -> list[str]:
        """For a person."""
        reads = self.reads_per_node * self.chunk_bytes
        return [
            f"samples            {self.samples:,} ({_size(self.total_bytes)})",
            f"index              {_size(self.index_bytes)} on disk and in each process",
            f"chunks             {self.chunks:,} of {CHUNK} samples, about {_size(self.chunk_bytes)} each",
            f"reads per node     {self.reads_per_node:,} an epoch, {_size(reads)}, on each of {self.nodes} nodes",
            f"cache per node     {_size(self.cache_bytes)}",
            f"read amplification {self.amplification:.2f}",
        ]


def make_plan(samples: int, total_bytes: int, *, nodes: int, ranks_per_node: int, seed: int = 0) -> Plan:
    """Counts what each node reads in the first epoch.

    Args:
        samples: of the set.
        total_bytes: of all images.
        nodes: that train.
        ranks_per_node: processes on each.
        seed: of the order; the answer hardly depends on it.
    """
    world = nodes * ranks_per_node
    positions = np.arange(min(samples, _MOST_POSITIONS))
    chunks = Order(samples, seed).ids(positions) // CHUNK
    # Rank r of W takes the positions p with p % W == spread(r).
    node_of_place = np.empty(world, np.int64)
    for rank in range(world):
        node_of_place[spread_rank(rank, world, ranks_per_node)] = rank // ranks_per_node
    nodes_of = node_of_place[positions % world]
    counts, open_at_once = [], []
    for node in range(nodes):
        mine = chunks[nodes_of == node]
        if not len(mine):
            continue
        distinct, first = np.unique(mine, return_index=True)
        last = len(mine) - 1 - np.unique(mine[::-1], return_index=True)[1]
        changes = np.zeros(len(mine) + 1, np.int64)
        np.add.at(changes, first, 1)
        np.add.at(changes, last + 1, -1)
        counts.append(len(distinct))
        open_at_once.append(int(changes.cumsum().max()))
    total = len(np.unique(chunks))
    all_chunks = -(-samples // CHUNK)
    chunk_bytes = round(total_bytes / samples * min(CHUNK, samples))
    return Plan(
        samples=samples,
        total_bytes=total_bytes,
        nodes=nodes,
        index_bytes=samples * INDEX_BYTES_PER_SAMPLE,
        chunks=all_chunks,
        chunk_bytes=chunk_bytes,
        reads_per_node=round(max(counts) * all_chunks / total),
        cache_bytes=max(open_at_once) * chunk_bytes,
        amplification=sum(counts) / total,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `scalevit shards plan`."""
    parser.add_argument("shards", nargs="?", help="shards that exist; or describe a set by the next two")
    parser.add_argument("--samples", type=int, help="images of the set")
    parser.add_argument("--image-bytes", type=int, default=110_000, help="mean of an image (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan.

    Raises:
        UserError: neither shards nor a number of samples, or numbers below 1.
    """
    if (arguments.shards is None) == (arguments.samples is None):
        raise UserError("give either shards or --samples")
    for name in ("samples", "image_bytes", "nodes", "ranks_per_node"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} = {value}: must be at least 1")
    samples, total = arguments.samples, (arguments.samples or 0) * arguments.image_bytes
    if arguments.shards is not None:
        from scalevit.data.shards.index import load_index

        index = load_index(arguments.shards)
        samples, total = len(index), int(index.size.sum())
    plan = make_plan(samples, total, nodes=arguments.nodes, ranks_per_node=arguments.ranks_per_node)
    for line in plan.lines():
        print(line)
    if plan.amplification > 1.05:
        fitting = max(n for n in range(1, arguments.nodes + 1) if LANES % n == 0)
        print(f"nodes that divide {LANES}, for example {fitting}, would read each chunk once")


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
