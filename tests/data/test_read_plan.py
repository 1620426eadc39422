import pytest

from scalevit.data.order.batching import order_rank
from scalevit.data.order.read_plan import INDEX_BYTES_PER_SAMPLE, plan_reads
from scalevit.data.order.shuffle import SMALL


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6, 8, 12, 16, 24, 48])
def test_each_chunk_is_read_by_one_node_where_the_nodes_divide_the_lanes(nodes):
    plan = plan_reads(1_281_167, 1_281_167 * 110_000, nodes=nodes, ranks_per_node=8)
    # But for those that a border between the lanes of two nodes cuts.
    assert 1 <= plan.amplification <= (1.005 if nodes != 8 else 1 + 8 / 10_010)
    assert plan.chunks == 10_010
    assert plan.reads_per_node == pytest.approx(10_010 / nodes, rel=0.02)


def test_other_numbers_of_nodes_read_chunks_several_times():
    assert plan_reads(100_000, 10**9, nodes=5, ranks_per_node=8).amplification > 4.9


def test_the_cache_holds_the_windows_of_a_nodes_lanes():
    plan = plan_reads(1_281_167, 1_281_167 * 110_000, nodes=8, ranks_per_node=8)
    # A window of 64 chunks for each of 12 lanes, and the beginnings of the next.
    assert 12 * 64 <= plan.cache_bytes / plan.chunk_bytes <= 12 * 70


def test_small_sets_are_read_whole_by_every_node():
    plan = plan_reads(SMALL - 1, 10**9, nodes=4, ranks_per_node=1)
    assert plan.amplification == pytest.approx(4, rel=0.01)
    assert plan.cache_bytes == pytest.approx(10**9, rel=0.02)
    assert plan_reads(1, 100, nodes=4, ranks_per_node=2).amplification == 1


def test_very_large_sets_are_planned_from_their_first_windows():
    plan = plan_reads(10**9, 10**14, nodes=12, ranks_per_node=8)
    assert plan.amplification < 1.02
    assert plan.reads_per_node == pytest.approx(10**9 / 128 / 12, rel=0.03)


def test_places_of_ranks_are_one_to_one_and_keep_nodes_apart():
    for world_size, ranks_per_node in ((1, 1), (8, 8), (64, 8), (6, 2), (12, 3)):
        places = [order_rank(rank, world_size, ranks_per_node) for rank in range(world_size)]
        assert sorted(places) == list(range(world_size))
        nodes = world_size // ranks_per_node
        assert [place % nodes for place in places] == [rank // ranks_per_node for rank in range(world_size)]
    assert [order_rank(rank, 5, 2) for rank in range(5)] == list(range(5))


def test_the_index_is_as_large_as_planned(index):
    arrays = (index.shard, index.offset, index.size, index.kind, index.label, index.crc32)
    assert sum(array.nbytes for array in arrays) == len(index) * INDEX_BYTES_PER_SAMPLE
