"""Complete verification of shards, one report per shard, without stopping at the first fault.

Knows tars, metadata and images; must not know orders or loaders.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from zlib import crc32

from scalevit.data import images
from scalevit.data.faults import Fault
from scalevit.data.shards.labels import INTEGERS, LabelFormat
from scalevit.data.shards.samples import IndexedSample, Scan, ShardMetadata, read_shard_metadata, scan_shard
from scalevit.data.storage.files import ShardFile, open_shard
from scalevit.data.workers import initialise_worker, worker_context
from scalevit.errors import UserError
from scalevit.terminal import ProgressBar


@dataclass
class ShardReport:
    """The result for one shard."""

    path: str
    good: int = 0
    """Samples that are intact, labelled and decodable."""
    faults: list[Fault] = field(default_factory=list)
    """One for each bad sample, each broken header and each difference from the metadata."""
    notes: Counter[str] = field(default_factory=Counter)
    """Images that are usable but unusual, by reason: other formats than their names say, grey, CMYK, very small."""
    checksums: bool = False
    """Whether images could be compared with checksums. Without, a flipped byte that still decodes is not detected."""


def verify_shards(
    paths: Sequence[str],
    *,
    labels: LabelFormat = INTEGERS,
    num_classes: int | None = None,
    decode: bool = True,
    workers: int = 0,
) -> Iterator[ShardReport]:
    """Verifies shards, with progress on standard error; yields their reports in order.

    Args:
        paths: of `discovery.find_shards`.
        labels: how they are written.
        num_classes: labels must be below it.
        decode: whether images are decoded and compared with their checksums, which takes most of the time.
        workers: number of processes; 0 verifies in this one.
    """
    check = partial(verify_shard, labels=labels, num_classes=num_classes, decode=decode)
    with ProgressBar("verifying", len(paths), "shards") as counter:
        if workers == 0:
            for path in paths:
                yield check(path)
                counter.advance()
            return
        context = worker_context(("scalevit.data.shards.verify",))
        with ProcessPoolExecutor(workers, mp_context=context, initializer=initialise_worker) as pool:
            futures: list[Future[ShardReport]] = [pool.submit(check, path) for path in paths]
            for future in futures:
                yield future.result()
                counter.advance()


def verify_shard(path: str, *, labels: LabelFormat, num_classes: int | None, decode: bool) -> ShardReport:
    """Verifies one shard: counts, header chain, end of archive, checksums, labels, decoding."""
    report = ShardReport(path)
    try:
        with closing(open_shard(path)) as file:
            metadata = read_shard_metadata(path)
            scan = scan_shard(file, labels, skip_broken=True)
            report.faults += scan.faults
            report.faults += [Fault(path, "", error.offset, error.reason) for error in scan.header_errors]
            report.faults += [Fault(path, "", 0, reason) for reason in _differences(file, scan, metadata)]
            known = report.checksums = metadata is not None and len(metadata.crc32) == len(scan.samples) > 0
            for number, sample in enumerate(scan.samples):
                expected = metadata.crc32[number] if known and metadata else None
                reason = _sample_error(file, sample, expected, num_classes, decode, report.notes)
                if reason:
                    report.faults.append(Fault(path, sample.key, sample.offset, reason))
                else:
                    report.good += 1
    except UserError as error:
        report.faults.append(Fault(path, "", 0, str(error)))
    report.faults.sort(key=lambda fault: fault.offset)
    return report


def _differences(file: ShardFile, scan: Scan, metadata: ShardMetadata | None) -> list[str]:
    """Differences between a shard and its metadata."""
    if metadata is None:
        return [] if scan.count else ["holds no samples"]
    found = []
    if metadata.size != file.size:
        found.append(f"has {file.size} bytes, but {metadata.size} were written")
    if metadata.samples != scan.count:
        found.append(f"holds {scan.count} samples, but {metadata.samples} were written")
    elif metadata.classes != (counts := Counter(sample.label for sample in scan.samples)) and not scan.faults:
        label = next(n for n in {*counts, *metadata.classes} if counts[n] != metadata.classes.get(n, 0))
        found.append(f"has {counts[label]} images of label {label}, but {metadata.classes.get(label, 0)} were written")
    if _sha256(file) != metadata.sha256:
        found.append("its bytes have changed since it was written (wrong SHA-256)")
    return found


def _sha256(file: ShardFile) -> str:
    digest = hashlib.sha256()
    for offset in range(0, file.size, 1 << 22):
        digest.update(file.read(offset, 1 << 22))
    return digest.hexdigest()


def _sample_error(
    file: ShardFile,
    sample: IndexedSample,
    expected: int | None,
    num_classes: int | None,
    decode: bool,
    notes: Counter[str],
) -> str:
    """Why a sample is bad, or an empty string; adds to the notes."""
    if sample.label < 0 or (num_classes is not None and sample.label >= num_classes):
        limit = "0 or more" if num_classes is None else f"in 0..{num_classes - 1}"
        return f"label {sample.label} is not {limit}"
    if not decode:
        return ""
    payload = file.read(sample.offset, sample.size)
    if expected is not None and crc32(payload) != expected:
        return "the image's bytes have changed (wrong checksum)"
    try:
        with images.open_image(payload) as image:
            named, actual = images.KINDS[sample.kind], (image.format or "?").lower()
            if actual != named.replace("jpg", "jpeg"):
                notes[f"{actual} named {named}"] += 1
            if image.mode != "RGB":
                notes[f"mode {image.mode}"] += 1
            if min(image.size) < 8:
                notes["a side under 8 pixels"] += 1
        images.decode_pixels(payload)
    except images.UndecodableImage as error:
        return f"the image cannot be decoded ({error})"
    return ""
