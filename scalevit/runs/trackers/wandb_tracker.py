"""Weights & Biases."""

from typing import Literal

from scalevit.runs.trackers.base import Tracker


class WandbTracker(Tracker):
    """Weights & Biases."""

    name: Literal["wandb"] = "wandb"
    mode: Literal["online", "offline"] = "online"
    """offline writes files that `wandb sync` uploads later."""
    project: str = "scalevit"
    entity: str | None = None
    """User or team; null takes the account's default."""
    tags: list[str] = []
