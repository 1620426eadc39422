"""Samples in memory as a source."""

import hashlib
from collections.abc import Sequence

from scalevit.data import images
from scalevit.data.writing.sources.base import LeftOut, Sample, short_digest


class MemorySource:
    """Samples in memory, with their own keys."""

    left_out: Sequence[LeftOut] = ()

    def __init__(self, samples: Sequence[Sample], classes: Sequence[str] | None = None) -> None:
        keys = {key for key, _, _, _ in samples}
        bad = [sample for sample in samples if "." in sample[0] or sample[1] not in images.KINDS]
        if len(keys) != len(samples) or bad:
            raise ValueError(f"keys must be unique and contain no dot, extensions must be one of {images.KINDS}")
        self.samples, self.classes = samples, classes

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, number: int) -> Sample:
        return self.samples[number]

    def origin(self, number: int) -> str:
        return self.samples[number][0]

    def fingerprint(self) -> str:
        return short_digest(
            f"{key}.{kind}\0{label}\0{hashlib.sha256(payload).hexdigest()}"
            for key, kind, payload, label in self.samples
        )
