"""metrics.jsonl, which every run has: one record a line. Part of the run folder, so not among `TRACKERS`."""

import sys
from pathlib import Path
from typing import Literal

from pydantic import PrivateAttr

from scalevit.errors import UserError
from scalevit.files import write_whole
from scalevit.runs.records import Record, read_records, to_json_line
from scalevit.runs.trackers.base import RunInfo, Tracker


class JsonlTracker(Tracker):
    """metrics.jsonl. Unlike with other trackers, a record that cannot be written ends the run."""

    name: Literal["jsonl"] = "jsonl"
    enabled: bool = True
    _path: Path = PrivateAttr()

    def open(self, run: RunInfo, saved: str | None) -> None:
        """Removes the records of steps that a resumed run computes again, and lines that cannot be read.

        Raises:
            UserError: the file cannot be read or written.
        """
        self._path = run.metrics
        try:
            records, damaged = read_records(self._path)
            kept = [to_json_line(record) + "\n" for record in records if record["step"] <= run.step]
            if self._path.exists():
                write_whole(self._path, "".join(kept).encode())  # a run that is killed here loses nothing
        except OSError as error:
            raise self._unwritable(error) from None
        if damaged:
            print(f"warning: {self._path}: removed {damaged} damaged lines", file=sys.stderr, flush=True)

    def log(self, record: Record) -> None:
        """Appends a line.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            with self._path.open("a") as file:
                file.write(to_json_line(record) + "\n")
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self._path}: cannot be written ({error.strerror or error})")
