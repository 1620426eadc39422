import argparse
import shutil

import pytest

from scalevit.cli.shards import add_arguments, run
from scalevit.data.order.batching import spread_rank
from scalevit.data.order.read_plan import INDEX_BYTES_PER_SAMPLE, make_plan
from scalevit.data.order.shuffle import SMALL
from scalevit.data.shards.index import load_index
from scalevit.errors import UserError


def command(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([*map(str, arguments)]))


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6, 8, 12, 16, 24, 48])
def test_each_chunk_is_read_by_one_node_where_the_nodes_divide_the_lanes(nodes):
    plan = make_plan(1_281_167, 1_281_167 * 110_000, nodes=nodes, ranks_per_node=8)
    # But for those that a border between the lanes of two nodes cuts.
    assert 1 <= plan.amplification <= (1.005 if nodes != 8 else 1 + 8 / 10_010)
    assert "read amplification 1.00" in plan.lines()
    assert plan.chunks == 10_010
    assert plan.reads_per_node == pytest.approx(10_010 / nodes, rel=0.02)


def test_other_numbers_of_nodes_read_chunks_several_times():
    assert make_plan(100_000, 10**9, nodes=5, ranks_per_node=8).amplification > 4.9


def test_the_cache_holds_the_windows_of_a_nodes_lanes():
    plan = make_plan(1_281_167, 1_281_167 * 110_000, nodes=8, ranks_per_node=8)
    # A window of 64 chunks for each of 12 lanes, and the beginnings of the next.
    assert 12 * 64 <= plan.cache_bytes / plan.chunk_bytes <= 12 * 70


def test_small_sets_are_read_whole_by_every_node():
    plan = make_plan(SMALL - 1, 10**9, nodes=4, ranks_per_node=1)
    assert plan.amplification == pytest.approx(4, rel=0.01)
    assert plan.cache_bytes == pytest.approx(10**9, rel=0.02)
    assert make_plan(1, 100, nodes=4, ranks_per_node=2).amplification == 1


def test_very_large_sets_are_planned_from_their_first_windows():
    plan = make_plan(10**9, 10**14, nodes=12, ranks_per_node=8)
    assert plan.amplification < 1.02
    assert plan.reads_per_node == pytest.approx(10**9 / 128 / 12, rel=0.03)


def test_places_of_ranks_are_one_to_one_and_keep_nodes_apart():
    for world_size, ranks_per_node in ((1, 1), (8, 8), (64, 8), (6, 2), (12, 3)):
        places = [spread_rank(rank, world_size, ranks_per_node) for rank in range(world_size)]
        assert sorted(places) == list(range(world_size))
        nodes = world_size // ranks_per_node
        assert [place % nodes for place in places] == [rank // ranks_per_node for rank in range(world_size)]
    assert [spread_rank(rank, 5, 2) for rank in range(5)] == list(range(5))


def test_the_index_is_as_large_as_planned(index):
    arrays = (index.shard, index.offset, index.size, index.kind, index.label, index.crc32)
    assert sum(array.nbytes for array in arrays) == len(index) * INDEX_BYTES_PER_SAMPLE


def test_command(shards, capsys):
    command("plan", "--samples", 50_000, "--image-bytes", 100_000, "--nodes", 2)
    assert "50,000 (5 GB)" in capsys.readouterr().out
    command("plan", "--samples", 50_000, "--nodes", 5)
    assert "nodes that divide 96, for example 4, would read each chunk once" in capsys.readouterr().out
    command("plan", shards)
    assert "samples            23 (" in capsys.readouterr().out
    for arguments, message in (
        ((), "either shards or --samples"), (("--samples", 0), "--samples = 0: must be at least 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            command("plan", *arguments)


def test_index_and_verify_commands(shards, tmp_path, capsys):
    command("index", shards, "--checksums")
    shown = capsys.readouterr().out
    assert "23 samples of 3 labels in 3 shards, with checksums; 0 left out" in shown
    assert load_index(shards).fingerprint in shown
    command("verify", shards, "--workers", 0, "--num-classes", 3)
    shown = capsys.readouterr().out
    assert "note: 3 images: mode CMYK" in shown
    assert "no checksums" not in shown
    with pytest.raises(UserError, match=r"--report .*/no/where: cannot be written \(No such file"):
        command("verify", shards, "--report", tmp_path / "no" / "where")
    others = tmp_path / "others"
    shutil.copytree(shards, others, ignore=shutil.ignore_patterns("*.json", ".*"))
    command("verify", others, "--workers", 0)
    assert "note: 3 shards have no checksums: flipped bytes" in capsys.readouterr().out
    report = tmp_path / "faults.jsonl"
    with pytest.raises(UserError, match=r"8 faults in 2 of 3 shards; all are listed in .*faults\.jsonl"):
        command("verify", shards, "--workers", 0, "--num-classes", 2, "--report", report)
    assert len(report.read_text().splitlines()) == 8
    assert "label 2 is not in 0..1" in capsys.readouterr().out
