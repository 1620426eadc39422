"""metrics.csv: the records of metrics.jsonl as a table, for spreadsheets."""

import csv
from pathlib import Path
from typing import Literal

from pydantic import PrivateAttr

from scalevit.files import writing_whole
from scalevit.runs.records import Record, finite, read_records
from scalevit.runs.trackers.base import RunInfo, Tracker


class CsvTracker(Tracker):
    """A table `metrics.csv` in the run folder; a column for each key that a record has had so far."""

    name: Literal["csv"] = "csv"
    _run: RunInfo = PrivateAttr()
    _columns: list[str] = PrivateAttr(default_factory=list)

    def open(self, run: RunInfo, saved: str | None) -> None:
        self._run = run
        self._rewrite()

    def log(self, record: Record) -> None:
        if record.keys() <= set(self._columns):
            with self._path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(_cells(record))
        else:
            self._rewrite()  # with the new columns

    @property
    def _path(self) -> Path:
        return self._run.folder / "metrics.csv"

    def _rewrite(self) -> None:
        records, _ = read_records(self._run.metrics)
        self._columns = list(dict.fromkeys(key for record in records for key in record))
        with writing_whole(self._path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(map(_cells, records))


def _cells(record: Record) -> Record:
    return {key: finite(value) for key, value in record.items()}
