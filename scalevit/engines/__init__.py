"""Engines: how a module is sharded over ranks and stepped. Knows modules and optimizers, not ViTs, data or metrics.

A new engine is its folder and one line here.
"""

from scalevit.engines.deepspeed.settings import DeepSpeedSettings
from scalevit.engines.fsdp.settings import FsdpSettings

ENGINES = (DeepSpeedSettings, FsdpSettings)
