"""What an engine cannot do on this machine or with these ranks is refused before any process group exists."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from scalevit.distributed import World
from scalevit.engines.deepspeed.settings import DeepSpeedSettings
from scalevit.engines.fsdp.engine import without_view
from scalevit.engines.fsdp.settings import FsdpSettings
from scalevit.errors import UserError


def world(size: int) -> World:
    return World(rank=0, size=size, local_rank=0, ranks_per_node=size, device=torch.device("cpu"))


def test_shards_must_divide_the_ranks() -> None:
    with pytest.raises(UserError) as error:
        FsdpSettings(shard_size=3).check(world(4))
    assert str(error.value) == "shard_size = 3: does not divide the 4 ranks of this run"
    with pytest.raises(UserError, match="shard_size = 8"):
        FsdpSettings(shard_size=8).check(world(4))
    for size in (1, 2, 4, None):
        FsdpSettings(shard_size=size).check(world(4))


def test_an_offload_to_nvme_says_what_it_lacks(tmp_path: Path) -> None:
    able = AsyncIOBuilder().is_compatible(verbose=False)
    missing = tmp_path / "missing"
    settings = DeepSpeedSettings(stage=3, offload_optimizer="nvme", nvme_path=str(missing))
    with pytest.raises(UserError) as error:
        settings.check(world(2))
    assert "\n" not in str(error.value)
    assert (f"nvme_path = {json.dumps(str(missing))}" if able else "libaio") in str(error.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adaptive_clipping_needs_whole_rows(stage: int) -> None:
    refusal = DeepSpeedSettings(stage=stage).clip_refusal("agc")
    assert refusal == (
        "needs whole rows of the gradient (ZeRO stage 0 or FSDP2), which "
        f"ZeRO {stage} does not have; it clips by norm or value"
    )
    for settings in (DeepSpeedSettings(stage=0), FsdpSettings(), FsdpSettings(shard_size=1)):
        assert settings.clip_refusal("agc") is None
    assert all(DeepSpeedSettings(stage=stage).clip_refusal(mode) is None for mode in ("norm", "value"))


def test_a_view_becomes_a_tensor_of_its_own() -> None:
    x = torch.ones(2, 6, requires_grad=True)
    y = without_view(lambda tensor: (2 * tensor).view(3, 4), x)
    assert y.shape == (3, 4)
    assert not y._is_view()
    y += 1  # through a view, FSDP's hook would be lost here
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2, 6), 2.0))
