"""TensorBoard event files, written by the package tensorboard itself (no torch, no TensorFlow)."""

import time
from typing import Any, Literal

from pydantic import PrivateAttr

from scalevit.errors import require
from scalevit.runs.records import Record, numbers
from scalevit.runs.summary import Summary
from scalevit.runs.trackers.base import RunInfo, Tracker


class TensorBoardTracker(Tracker):
    """TensorBoard: event files in `runs/NAME/tensorboard`. Needs the extra `tensorboard`."""

    name: Literal["tensorboard"] = "tensorboard"
    _writer: Any = PrivateAttr(default=None)

    def check(self) -> None:
        require("tensorboard", extra="tensorboard")

    def open(self, run: RunInfo, saved: str | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(run.folder / "tensorboard"))
        # A session that starts at a step hides the later points of an earlier one, which this run computes again.
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=run.step + 1, session_log=start))

    def log(self, record: Record) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary as Scalars

        scalars = Scalars(value=[Scalars.Value(tag=tag, simple_value=value) for tag, value in numbers(record).items()])
        self._writer.add_event(Event(wall_time=time.time(), step=record["step"], summary=scalars))
        self._writer.flush()

    def close(self, summary: Summary | None) -> None:
        if self._writer is not None:
            self._writer.close()
