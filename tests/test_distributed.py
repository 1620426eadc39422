"""Process groups of one rank. Those of several are in the tests of engines."""

import os

import pytest
import torch

from scalevit.distributed import World


def test_a_process_group_leaves_no_variables_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process does or starts next would take them for a launcher's."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    before = dict(os.environ)
    world = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))
    with world.process_group():
        assert os.environ["RANK"] == "0"
        assert os.environ["MASTER_PORT"] != "1"
    assert dict(os.environ) == before
