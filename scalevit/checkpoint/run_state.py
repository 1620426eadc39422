"""Where a run stands, beside its tensors."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunState:
    """Everything else follows from it, the config and the tensors: a run's randomness has no state."""

    step: int = 0
    """Optimizer steps done, also those skipped for an overflow. Gives the data position too."""
    seconds: float = 0.0
    """Time spent in training steps."""
    timed_images: int = 0
    """Images whose training that time covers."""
    epochs: list[dict[str, Any]] = field(default_factory=list)
    """One record per evaluated epoch."""
    trackers: dict[str, str] = field(default_factory=dict)
    """What each tracker needs to continue a resumed run, by its name, for example wandb's run id."""
