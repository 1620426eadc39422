"""Bad samples: what is known of each, and the list and limit of a run.

Nothing here decides what becomes of a bad sample: the index leaves it out, training shows another in its place, and
evaluation counts it as wrong. Each of them reports a `Fault`. Must not know torch, ranks or configs.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from scalevit.errors import UserError


@dataclass(frozen=True)
class Fault:
    """One sample that cannot be used as it is."""

    shard: str
    """Path or address."""
    key: str
    offset: int
    """Bytes from the start of the shard to the image, or where there is none to the header of the member."""
    reason: str

    def __str__(self) -> str:
        return f"shard {self.shard}, key {self.key!r}, offset {self.offset}: {self.reason}"


class FaultLog:
    """The distinct bad samples of a run, with a file that lists each once and a limit that stops the run.

    Every rank is to be given the same faults, so that all count the same and stop together; one of them writes. A
    resumed run goes on with what its file lists.

    Args:
        path: of the file, one JSON object a line; it need not exist.
        limit: most bad samples that a run may have.
        writes: whether this process writes the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, limit: int, writes: bool = True) -> None:
        self.path, self.limit, self._writes = Path(path), limit, writes
        self._known: set[tuple[str, str, int]] = set()
        with_end = b""
        if self.path.exists():
            with_end = self.path.read_bytes()
        # A process killed while it wrote leaves half a line, which is not a fault that was listed.
        for line in with_end.split(b"\n")[:-1]:
            record = json.loads(line)
            self._known.add((record["shard"], record["key"], record["offset"]))
        self._whole = with_end.rpartition(b"\n")[0] + b"\n" if b"\n" in with_end else b""
        self._torn = len(self._whole) != len(with_end)

    @property
    def count(self) -> int:
        """Distinct bad samples so far."""
        return len(self._known)

    def add(self, faults: Iterable[Fault], **where: str | int) -> list[Fault]:
        """Lists the faults that are new.

        Args:
            faults: of any number of ranks, in any order.
            where: more fields for their lines, for example step=120.

        Returns:
            the new ones.

        Raises:
            UserError: there are more than the limit now; they are listed all the same.
        """
        new: dict[tuple[str, str, int], Fault] = {}
        for fault in faults:
            place = fault.shard, fault.key, fault.offset
            if place not in self._known:
                new.setdefault(place, fault)
        self._known |= new.keys()
        if new and self._writes:
            self._append([asdict(fault) | where for fault in new.values()])
        if new and self.count > self.limit:
            raise UserError(
                f"{self.count} bad samples, more than data.max_faults = {self.limit}; the newest: "
                f"{next(reversed(new.values()))}; all are listed in {self.path}; mend the shards or raise the limit"
            )
        return list(new.values())

    def _append(self, records: list[dict[str, str | int]]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._torn:
                self.path.write_bytes(self._whole)
                self._torn = False
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
