"""Existing shards, whatever tool wrote them, as a source."""

from collections.abc import Sequence
from zlib import crc32

from scalevit.data import images
from scalevit.data.loading.readers import SampleReadError, open_reader
from scalevit.data.shards.index import load_index
from scalevit.data.shards.labels import INTEGERS, LabelFormat
from scalevit.data.storage.paths import file_name
from scalevit.data.writing.sources.base import LeftOut, Sample, unique_key
from scalevit.errors import UserError


class ShardSource:
    """Existing shards, whatever tool wrote them.

    Args:
        pattern: as in `discovery.find_shards`.
        labels: how they are written.
        max_faults: maximum number of samples that cannot be used; they are left out.

    Raises:
        UserError: the shards are missing or damaged, or contain more samples that cannot be used.
    """

    def __init__(self, pattern: str, labels: LabelFormat = INTEGERS, *, max_faults: int = 0) -> None:
        self.index = load_index(pattern, labels=labels)
        self.classes: Sequence[str] | None = self.index.classes
        faults = self.index.faults
        if len(faults) > max_faults:
            raise UserError(
                f"{faults[0]} ({len(faults)} such samples): fix or remove them, or allow them by --max-faults"
            )
        self.left_out: Sequence[LeftOut] = [
            LeftOut(f"{fault.key} in {fault.shard}", "a sample that cannot be used") for fault in faults
        ]
        self._reader = open_reader(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def load(self, number: int) -> Sample:
        index = self.index
        try:
            payload = self._reader.read(number)
        except SampleReadError as error:
            raise UserError(str(index.fault(number, str(error)))) from None
        if index.crc32[number] >= 0 and crc32(payload) != index.crc32[number]:
            raise UserError(str(index.fault(number, "the image's bytes have changed (wrong checksum)")))
        key = file_name(index.key(number))
        return unique_key(number, key), images.KINDS[index.kind[number]], payload, int(index.label[number])

    def origin(self, number: int) -> str:
        return f"{self.index.key(number)} of {self.index.shards[self.index.shard[number]].path}"

    def fingerprint(self) -> str:
        return self.index.fingerprint
