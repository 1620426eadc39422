"""The seam of trackers: where a run's records go besides metrics.jsonl.

Knows records; must not import a tracker's library at module level. Only rank 0 opens trackers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalevit.config.base import Part

if TYPE_CHECKING:
    from scalevit.runs.records import Record
    from scalevit.runs.summary import Summary


@dataclass(frozen=True)
class RunInfo:
    """The run, as trackers know it."""

    name: str
    folder: Path
    """Exists; a tracker that writes files writes them here."""
    config: Mapping[str, Any]
    """The whole config, plain JSON values."""
    step: int
    """The optimizer step that the run starts or resumes from; records of later steps are written again."""

    @property
    def metrics(self) -> Path:
        """metrics.jsonl: every record up to and with the one that is being logged."""
        return self.folder / "metrics.jsonl"


class Tracker(Part):
    """One destination of records, off unless `enabled`.

    A setting that cannot work is a `SettingError` from `check` or `open`, and ends the run before its first step. Any
    error later is reported once; the run continues without this tracker.
    """

    name: str
    enabled: bool = False
    """Send the records of the run there."""

    def check(self) -> None:
        """Finds what is missing on this machine, before any process group exists.

        Raises:
            SettingError: it cannot work with these settings.
            UserError: a package is not installed; names the extra that installs it.
        """

    def open(self, run: RunInfo, saved: str | None) -> str | None:
        """Starts or resumes the run at this tracker.

        Args:
            saved: what `open` returned when the run's newest checkpoint was saved; None for a new run.

        Returns:
            What a resumed run needs to continue here, for example an id; None if nothing.

        Raises:
            SettingError: it cannot be opened with these settings.
            NotImplementedError: by this base class.
        """
        raise NotImplementedError

    def log(self, record: "Record") -> None:
        """Sends one record.

        Raises:
            NotImplementedError: by this base class.
        """
        raise NotImplementedError

    def close(self, summary: "Summary | None") -> None:
        """Flushes and closes.

        Args:
            summary: of the finished run; None if it was interrupted or failed.
        """
