"""Weights & Biases."""

from typing import Any, Literal

from pydantic import PrivateAttr

from scalevit.errors import SettingError, require
from scalevit.runs.records import Record, numbers
from scalevit.runs.summary import Summary
from scalevit.runs.trackers.base import RunInfo, Tracker


class WandbTracker(Tracker):
    """Weights & Biases. Needs the extra `wandb`."""

    name: Literal["wandb"] = "wandb"
    mode: Literal["online", "offline"] | None = None
    """offline writes files that `wandb sync` uploads later. null follows the environment variable WANDB_MODE (online,
    offline or disabled), and is online without one."""
    project: str = "scalevit"
    """The wandb project."""
    entity: str | None = None
    """User or team; null takes the account's default."""
    tags: list[str] = []
    """Tags of the run."""
    _run: Any = PrivateAttr(default=None)

    def check(self) -> None:
        require("wandb", extra="wandb")

    def open(self, run: RunInfo, saved: str | None) -> str:
        """Starts a wandb run, or resumes the one whose id was saved; returns its id."""
        import wandb

        try:
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                tags=self.tags,
                name=run.name,
                id=saved,
                resume="allow",
                mode=self.mode,
                dir=str(run.folder),
                config=dict(run.config),
            )
        except (wandb.Error, ValueError) as error:  # the latter for an unknown WANDB_MODE
            reason = " ".join(str(error).split())
            raise SettingError(
                "mode",
                self.mode,
                f"wandb cannot start a run ({reason}); offline, or WANDB_MODE=offline, needs no network",
            ) from None
        return str(self._run.id)

    def log(self, record: Record) -> None:
        self._run.log(numbers(record), step=record["step"])

    def close(self, summary: Summary | None) -> None:
        if summary is not None:
            self._run.summary.update(summary.to_json())
        self._run.finish()
