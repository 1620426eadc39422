"""All trackers of a run as one: metrics.jsonl first, then those that are enabled.

A failing tracker never ends the run; a failing metrics.jsonl does, as it is part of the run folder. Used on rank 0.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from scalevit.errors import SettingError, UserError, settings_of
from scalevit.runs.records import Record
from scalevit.runs.summary import Summary
from scalevit.runs.trackers.base import RunInfo, Tracker
from scalevit.runs.trackers.jsonl_tracker import JsonlTracker


class Tracking:
    """Sends records to every tracker."""

    def __init__(self, trackers: Sequence[Tracker]):
        """trackers: besides metrics.jsonl. They are copied, because settings never change and an open tracker does."""
        self._metrics = JsonlTracker()
        self._trackers = [tracker.model_copy() for tracker in trackers]
        self._open: list[Tracker] = []

    def check(self) -> None:
        """Finds what is missing on this machine, before any process group exists.

        Raises:
            SettingError: a tracker cannot work here; its arguments are sections by the tracker's name.
            UserError: a tracker's package is not installed.
        """
        for tracker in self._trackers:
            with settings_of(tracker.name):
                tracker.check()

    def open(self, run: RunInfo, saved: Mapping[str, str]) -> dict[str, str]:
        """Opens all of them.

        Args:
            saved: what a former call returned for this run; {} for a new one.

        Returns:
            What a resumed run hands back, by name of the tracker; also of trackers that are off now.

        Raises:
            SettingError: a tracker cannot be opened; its arguments are sections by the tracker's name.
            UserError: the run folder cannot be written.
        """
        self._metrics.open(run, None)
        tokens = dict(saved)
        for tracker in self._trackers:
            with settings_of(tracker.name):
                token = _open(tracker, run, saved.get(tracker.name))
            self._open.append(tracker)
            if token is not None:
                tokens[tracker.name] = token
        return tokens

    def log(self, record: Record) -> None:
        """Sends one record.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        self._metrics.log(record)
        for tracker in list(self._open):
            with self._dropping_on_failure(tracker, f"at step {record['step']}"):
                tracker.log(record)

    def close(self, summary: Summary | None) -> None:
        """Closes all of them; further calls do nothing.

        Args:
            summary: of the finished run; None if it was interrupted or failed.
        """
        trackers, self._open = self._open, []
        for tracker in trackers:
            with self._dropping_on_failure(tracker, "when it was closed"):
                tracker.close(summary)

    @contextmanager
    def _dropping_on_failure(self, tracker: Tracker, when: str) -> Iterator[None]:
        """Reports any error of a tracker's library, once, and leaves the tracker out from then on."""
        try:
            yield
        except Exception as error:
            self._open = [other for other in self._open if other is not tracker]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(
                f"warning: tracker {tracker.name} failed {when} ({reason}); the run continues without it",
                file=sys.stderr,
                flush=True,
            )


def _open(tracker: Tracker, run: RunInfo, saved: str | None) -> str | None:
    try:
        return tracker.open(run, saved)
    except UserError:
        raise
    except Exception as error:  # of any kind: it is a tracker's library, and other ranks wait for this one
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SettingError("enabled", True, f"cannot be opened ({reason})") from error
