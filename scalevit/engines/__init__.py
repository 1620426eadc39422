"""Engines: how a module is sharded over ranks and stepped. Knows modules and optimizers, not ViTs, data or metrics."""
