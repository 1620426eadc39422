"""Exponential moving average of the weights, on this rank's shards, every unique parameter once."""

from collections.abc import Mapping

import torch
from torch import Tensor

from scalevit.config.training import EmaConfig
from scalevit.engines.base import Engine
from scalevit.tying import uses_per_parameter


class Ema:
    """fp32 averages with the layout of `Engine.local_parameters`, so that an update needs no communication.

    timm's ModelEmaV3 walks `state_dict()`, where a shared MLP appears once per block that uses it, and so updates it
    several times per step: in pairs it decays with d^2 (0.9996 for 0.9998). Here each parameter decays once. Passing
    the number of uses as `updates` reproduces timm, and with it the paper's runs.
    """

    def __init__(self, local: Mapping[str, Tensor], config: EmaConfig, updates: Mapping[str, int] | None = None):
        """Starts at the current weights.

        Args:
            local: this rank's weights by canonical name.
            config: its decay is d in ema = d * ema + (1 - d) * weights.
            updates: how many times a parameter is updated per step; once if not named.
        """
        self.tensors = {name: tensor.detach().float().clone() for name, tensor in local.items()}
        self._config = config
        self._names: dict[int, list[str]] = {}  # by the number of updates
        for name in self.tensors:
            self._names.setdefault((updates or {}).get(name, 1), []).append(name)

    @classmethod
    def from_config(cls, config: EmaConfig, engine: Engine) -> "Ema | None":
        """The EMA of an engine's weights, or None where it is disabled."""
        if not config.enabled:
            return None
        updates = uses_per_parameter(engine.module) if config.shared_parameters == "per_use" else None
        return cls(engine.local_parameters(), config, updates)

    @torch.no_grad()
    def update(self, local: Mapping[str, Tensor], step: int, *, skipped: bool = False) -> None:
        """One step towards the current weights.

        Args:
            local: they.
            step: optimizer steps done, with those skipped.
            skipped: the last step did not change the weights.
        """
        if skipped and self._config.skipped_steps == "ignore":
            return
        decay = self.decay_at(step)
        for times, names in self._names.items():
            # k updates towards the same weights are one with weight 1 - d^k.
            weight = 1.0 - decay**times
            torch._foreach_lerp_([self.tensors[n] for n in names], [local[n].float() for n in names], weight)

    def decay_at(self, step: int) -> float:
        """The decay of the update after a number of steps: that of timm's `ModelEmaV3.get_decay`."""
        config = self._config
        if step <= 1 and (config.warmup or config.start == "first_step"):
            return 0.0
        if config.warmup:
            return min(1.0 - (1.0 + (step - 1) / config.warmup_gamma) ** -config.warmup_power, config.decay)
        return config.decay

    def load(self, local: Mapping[str, Tensor]) -> None:
        """Copies averages of the same layout."""
        for name, tensor in self.tensors.items():
            tensor.copy_(local[name])
