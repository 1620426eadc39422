import pytest

from scalevit.data.order.read_plan import INDEX_BYTES_PER_SAMPLE, plan_reads
from scalevit.data.order.shuffle import SMALL


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6, 8, 12, 16, 24, 48])
def test_each_chunk_is_read_by_one_node_where_the_nodes_divide_the_lanes(nodes):
    plan = plan_reads(1_281_167, 1_281_167 * 110_000, nodes=nodes, global_batch=3072)
    # But for those that a border between the lanes of two nodes cuts.
    assert 1 <= plan.amplification <= (1.005 if nodes != 8 else 1 + 8 / 10_010)
    assert plan.chunks == 10_010
    assert plan.reads_per_node == pytest.approx(10_010 / nodes, rel=0.02)


def test_other_numbers_of_nodes_read_few_chunks_in_common():
    """Nodes have neighbouring lanes; those that a border between two nodes cuts are read by both."""
    assert plan_reads(100_000, 10**9, nodes=5, global_batch=3072).amplification < 1.06
    assert plan_reads(100_000, 10**9, nodes=5, global_batch=100).amplification > 2, "too few lanes"


def test_the_cache_holds_the_windows_of_a_nodes_lanes():
    plan = plan_reads(1_281_167, 1_281_167 * 110_000, nodes=8, global_batch=1024)
    # A window of 64 chunks for each of 12 lanes, and the beginnings of the next.
    assert 12 * 64 <= plan.cache_bytes / plan.chunk_bytes <= 12 * 70


def test_small_sets_are_read_whole_by_every_node():
    plan = plan_reads(SMALL - 1, 10**9, nodes=4, global_batch=1024)
    assert plan.amplification == pytest.approx(4, rel=0.01)
    assert plan.cache_bytes == pytest.approx(10**9, rel=0.02)
    assert plan_reads(1, 100, nodes=4, global_batch=64).amplification == 1


def test_very_large_sets_are_planned_from_their_first_windows():
    plan = plan_reads(10**9, 10**14, nodes=12, global_batch=3072)
    assert plan.amplification < 1.02
    assert plan.reads_per_node == pytest.approx(10**9 / 128 / 12, rel=0.03)


@pytest.mark.parametrize(("global_batch", "nodes"), [(1024, 2), (1024, 16), (1024, 8), (64, 2), (768, 12)])
def test_common_batches_have_lanes_for_common_numbers_of_nodes(global_batch, nodes):
    assert plan_reads(1_281_167, 10**11, nodes=nodes, global_batch=global_batch).amplification < 1.01


def test_the_index_is_as_large_as_planned(index):
    arrays = (index.shard, index.offset, index.size, index.kind, index.label, index.crc32)
    assert sum(array.nbytes for array in arrays) == len(index) * INDEX_BYTES_PER_SAMPLE
