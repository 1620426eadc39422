"""The state of a run beside its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_origin, get_type_hints


@dataclass
class RunState:
    """Everything else follows from it, the config and the tensors: a run's randomness has no state."""

    step: int = 0
    """Optimizer steps done, including those skipped for an overflow. Gives the data position too."""
    seconds: float = 0.0
    """Time spent in training steps."""
    timed_images: int = 0
    """Images whose training that time covers."""
    epochs: list[dict[str, Any]] = field(default_factory=list)
    """One record per evaluated epoch."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Settings that were changed when the run was resumed: {"step": 12, "changes": {"optimizer.lr": [0.001, 0.5]}}."""
    trackers: dict[str, str] = field(default_factory=dict)
    """What each tracker needs to continue a resumed run, by its name, for example wandb's run id."""

    def metric_by_epoch(self, *keys: str) -> dict[int, float]:
        """By epoch, from 1: the first of these values that its evaluation record has."""
        values = {record["epoch"]: [record[key] for key in keys if key in record] for record in self.epochs}
        return {epoch: found[0] for epoch, found in values.items() if found}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "RunState":
        """The state that a checkpoint holds.

        Raises:
            ValueError: it has a field more or less, or one of another type; another version of scalevit wrote it.
        """
        types = get_type_hints(cls)
        for name in sorted(types.keys() ^ record.keys()):
            raise ValueError(f"{name} is {'missing' if name in types else 'unknown'}")
        for name, hint in types.items():
            allowed = (int, float) if hint is float else get_origin(hint) or hint
            if not isinstance(record[name], allowed):
                raise ValueError(f"{name} is {type(record[name]).__name__}")
        return cls(**record)
