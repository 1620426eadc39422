"""Bad samples: their description, and the list and limit of a run.

Nothing here decides how a bad sample is handled: the index leaves it out, training replaces it by another, and
evaluation counts it as wrong. Each of them reports a `Fault`. Must not know torch, ranks or configs.
"""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from scalevit.errors import SettingError, UserError


@dataclass(frozen=True)
class Fault:
    """A sample that cannot be used."""

    shard: str
    """Path or address."""
    key: str
    offset: int
    """Bytes from the start of the shard to the image; without an image, to the header of the member."""
    reason: str

    def __str__(self) -> str:
        return f"shard {self.shard}, key {self.key!r}, offset {self.offset}: {self.reason}"


class FaultLog:
    """The distinct bad samples of a run: a file that lists each once, and a limit that stops the run.

    All ranks must be given the same faults, so that they count the same and stop together; one of them writes the
    file. A resumed run starts with the samples in its file.

    Args:
        path: of the file, one JSON object per line; it need not exist. None: there is no file, they are only counted.
        limit: maximum number of bad samples in a run.
        writes: whether this process writes the file.

    Raises:
        UserError: the file cannot be read, or a line of it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, limit: int, writes: bool = True) -> None:
        self.path, self.limit = None if path is None else Path(path), limit
        self._writes = writes and path is not None
        complete, self._incomplete_line = _split_last_line(b"" if self.path is None else _read(self.path))
        self._known = {self._read_line(line, number) for number, line in enumerate(complete.splitlines(), 1)}
        self._complete_bytes = len(complete)
        if self._incomplete_line and self._writes:
            print(f"warning: {self.path}: ignoring an incomplete last line", file=sys.stderr, flush=True)

    @property
    def count(self) -> int:
        """Distinct bad samples so far."""
        return len(self._known)

    def add(self, faults: Iterable[Fault], **where: str | int) -> list[Fault]:
        """Adds the faults that are new, and lists them in the file.

        Args:
            faults: of any number of ranks, in any order.
            where: further fields of their lines, for example step=120.

        Returns:
            the new faults.

        Raises:
            SettingError: `limit`; the faults are listed nevertheless.
            UserError: the file cannot be written.
        """
        new: dict[tuple[str, str, int], Fault] = {}
        for fault in faults:
            place = fault.shard, fault.key, fault.offset
            if place not in self._known:
                new.setdefault(place, fault)
        self._known |= new.keys()
        if new and self._writes and self.path is not None:
            self._append(self.path, [asdict(fault) | where for fault in new.values()])
        if new and self.count > self.limit:
            last = next(reversed(new.values()))
            listed = "`scalevit shards verify` lists all" if self.path is None else f"full list in {self.path}"
            raise SettingError(
                "limit",
                self.limit,
                f"found {self.count} bad samples (last: {last}; {listed}): fix the shards or raise the limit",
            )
        return list(new.values())

    def _append(self, path: Path, records: list[dict[str, str | int]]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._incomplete_line:
                os.truncate(path, self._complete_bytes)
                self._incomplete_line = False
            with open(path, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None

    def _read_line(self, line: bytes, number: int) -> tuple[str, str, int]:
        try:
            record = json.loads(line)
            return str(record["shard"]), str(record["key"]), int(record["offset"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UserError(f"{self.path}, line {number}: is not a bad sample's record; remove the line") from None


def _read(path: Path) -> bytes:
    """The content of a file, nothing if there is none.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _split_last_line(content: bytes) -> tuple[bytes, bool]:
    """The complete lines of a file, and whether an incomplete one follows: a killed process leaves half a line, or one
    of zeros after a loss of power.
    """
    complete, newline, rest = content.rpartition(b"\n")
    return complete + newline, bool(rest)
