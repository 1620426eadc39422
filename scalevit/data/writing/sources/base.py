"""The seam of sources: samples that become shards, whose images are read one at a time, in any order, by any process.

Must not know how shards are written, nor torch.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

Sample = tuple[str, str, bytes, int]
"""Key, extension, bytes of the image, label."""


class LeftOut(NamedTuple):
    """A file or folder that a source does not use."""

    path: str
    reason: str


class Source(Protocol):
    """Samples to be written."""

    classes: Sequence[str] | None
    """Names of the labels 0.., None if unknown."""
    left_out: Sequence[LeftOut]
    """What lies beside the samples and is not used."""

    def __len__(self) -> int: ...

    def load(self, number: int) -> Sample:
        """A sample with its stored image. Keys are unique and contain no dot.

        Raises:
            UserError: it cannot be read.
        """
        ...

    def origin(self, number: int) -> str:
        """Where a sample comes from, for messages."""
        ...

    def fingerprint(self) -> str:
        """16 hex digits that depend on all names and labels."""
        ...


def unique_key(number: int, name: str) -> str:
    """A key from the sample's number, which makes it unique, and its name, which helps to find the file."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", re.sub(r"^\d{9}-", "", name))[:80]
    return f"{number:09d}-{stem}" if stem else f"{number:09d}"


def short_digest(lines: Iterable[str]) -> str:
    """16 hex digits of the SHA-256 of lines."""
    hashed = hashlib.sha256()
    for line in lines:
        hashed.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return hashed.hexdigest()[:16]
