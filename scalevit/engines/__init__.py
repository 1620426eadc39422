"""Engines: how a module is sharded over ranks and stepped. Knows modules and optimizers, not ViTs, data or metrics."""

from torch import nn

from scalevit.config import DeepSpeedConfig, FsdpConfig
from scalevit.engines.base import Engine, Setup, StepResult
from scalevit.engines.pieces import Moments, Piece
from scalevit.engines.world import World

__all__ = ["Engine", "Moments", "Piece", "Setup", "StepResult", "World", "build_engine"]


def build_engine(module: nn.Module, setup: Setup, settings: DeepSpeedConfig | FsdpConfig) -> Engine:
    """The engine that the config names, around a module that it takes over."""
    # Imported here: DeepSpeed takes seconds to import, and an FSDP run needs none of it.
    if isinstance(settings, DeepSpeedConfig):
        from scalevit.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, setup, settings)
    from scalevit.engines.fsdp import FsdpEngine

    return FsdpEngine(module, setup, settings)
