"""Builds the engine that the config names."""

from torch import nn

from scalevit.distributed import World
from scalevit.engines.base import Engine, Setup
from scalevit.engines.deepspeed.settings import DeepSpeedSettings
from scalevit.engines.fsdp.settings import FsdpSettings
from scalevit.engines.settings import EngineSettings
from scalevit.errors import UserError


def check_engine(settings: EngineSettings, world: World) -> None:
    """Finds what cannot work on this machine or with this many ranks before any process group exists.

    Raises:
        UserError: the ranks do not divide into shards, or DeepSpeed refuses its own settings or cannot offload to NVMe
            here.
    """
    if isinstance(settings, FsdpSettings):
        if settings.shard_size is not None and world.size % settings.shard_size:
            raise UserError(
                f"config: engine.shard_size = {settings.shard_size} does not divide the {world.size} ranks of this run"
            )
    elif isinstance(settings, DeepSpeedSettings) and (settings.native or settings.nvme_path is not None):
        from scalevit.engines.deepspeed.engine import check_native, check_offload

        check_native(settings)
        check_offload(settings)


def build_engine(module: nn.Module, setup: Setup, settings: EngineSettings) -> Engine:
    """The engine that the config names, around a module that it takes over."""
    # Imported here: DeepSpeed takes seconds to import, and an FSDP run needs none of it.
    if isinstance(settings, DeepSpeedSettings):
        from scalevit.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(module, setup, settings)
    from scalevit.engines.fsdp.engine import FsdpEngine

    assert isinstance(settings, FsdpSettings)
    return FsdpEngine(module, setup, settings)
