"""Means and sums since the last training record."""

import math
from typing import Any

import torch
from torch import Tensor

from scalevit.distributed import World
from scalevit.training.step import StepReport


class Interval:
    """What a training record reports of the steps since the one before."""

    def __init__(self, world: World):
        self._world = world
        self.latest_loss = math.nan
        """Of this rank's images: of the last step on a CPU, else of the last record: on a GPU reading it would wait for
        the step."""
        self.latest_data_wait = math.nan
        """Share of the steps' time that this rank waited for its loader, since the last record."""
        self._reset()

    def _reset(self) -> None:
        self._losses: dict[str, Tensor] = {}
        self._image_sizes: list[int] = []
        self.steps, self._seconds, self._data_seconds, self._skipped, self._grad_norm = 0, 0.0, 0.0, 0, math.nan

    def add(self, report: StepReport, image_size: int | None = None) -> None:
        """One optimizer step.

        Args:
            report: of the step.
            image_size: side of its images in pixels, where steps have several.
        """
        if image_size is not None:
            self._image_sizes.append(image_size)
        for name, loss in report.losses.items():
            self._losses[name] = self._losses[name] + loss if name in self._losses else loss
        self.steps += 1
        self._seconds += report.seconds
        self._data_seconds += report.data_seconds
        self.latest_data_wait = self._data_seconds / self._seconds
        self._skipped += report.result.skipped
        self._grad_norm = report.result.grad_norm
        if self._world.device.type == "cpu":
            self.latest_loss = report.losses["loss"].item() * self._world.size

    def take(self, images_per_step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The mean losses over steps, and the rest of the record; starts the next interval. Collective.

        Args:
            images_per_step: over all ranks.
        """
        share = torch.tensor(self._data_seconds / self._seconds / self._world.size, device=self._world.device)
        sums = self._world.all_reduce_sum(torch.stack([*self._losses.values(), share]))
        losses = dict(zip(self._losses, (sums[:-1] / self.steps).tolist(), strict=True))
        self.latest_loss = losses["loss"]
        rest = {
            "grad_norm": self._grad_norm,
            "skipped": self._skipped,
            "images_per_second": self.steps * images_per_step / self._seconds,
            "data_wait": sums[-1].item(),
        }
        if self._image_sizes:
            rest["image_size"] = sum(self._image_sizes) / self.steps
        self._reset()
        return losses, rest
