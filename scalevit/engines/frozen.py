"""A module that only computes, beside the one that is trained: whole on every rank, or sharded over all of them.

Works next to any engine. Knows a module and the parts of it that are gathered at a time; must not know models or tasks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from scalevit.config.base import Precision
from scalevit.distributed import World
from scalevit.engines.precision import DTYPES
from scalevit.tying import group_by_shared_parameters


class FrozenModule:
    """A module in evaluation mode, without gradients. It is in no checkpoint, and no optimizer knows it."""

    def __init__(
        self, module: nn.Module, world: World, *, precision: Precision, units: Sequence[nn.Module] | None = None
    ):
        """Collective where it is sharded.

        Args:
            module: on the CPU, the same on every rank; taken over.
            world: this process among its peers.
            precision: of the forward, by autocast around fp32 weights as in the engines.
            units: parts of the module, each with its forward, that are gathered before it and freed after it; what is
                in none of them is gathered for the whole forward. None holds the whole module on every rank.
        """
        self.module = module.requires_grad_(False).eval()
        if precision != "fp32":
            module.forward = torch.autocast(world.device.type, DTYPES[precision])(module.forward)
        if units is None or world.size == 1:
            module.to(world.device)
            return
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
        # fully_shard moves what it shards to the device of the mesh, a unit at a time.
        for group in group_by_shared_parameters(units):
            fully_shard(group if len(group) > 1 else group[0], mesh=mesh, reshard_after_forward=True)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Any:
        """The module's output. Collective where it is sharded."""
        return self.module(inputs)
