"""Builds the engine that the config names."""

from torch import nn

from scalevit.config.tree import DeepSpeedConfig, FsdpConfig
from scalevit.distributed import World
from scalevit.engines.base import Engine, Setup
from scalevit.errors import UserError


def check_engine(settings: DeepSpeedConfig | FsdpConfig, world: World) -> None:
    """Finds what cannot work on this machine or with this many ranks before any process group exists.

    Raises:
        UserError: the ranks do not divide into shards, or DeepSpeed refuses its own settings or cannot offload to NVMe
            here.
    """
    if isinstance(settings, FsdpConfig):
        if settings.shard_size is not None and world.size % settings.shard_size:
            raise UserError(
                f"config: engine.shard_size = {settings.shard_size} does not divide the {world.size} ranks of this run"
            )
    elif settings.deepspeed or settings.nvme_path is not None:
        from scalevit.engines.deepspeed.engine import check_native, check_offload

        check_native(settings)
        check_offload(settings)


def build_engine(module: nn.Module, setup: Setup, settings: DeepSpeedConfig | FsdpConfig) -> Engine:
    """The engine that the config names, around a module that it takes over."""
    # Imported here: DeepSpeed takes seconds to import, and an FSDP run needs none of it.
    if isinstance(settings, DeepSpeedConfig):
        from scalevit.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(module, setup, settings)
    from scalevit.engines.fsdp.engine import FsdpEngine

    return FsdpEngine(module, setup, settings)
