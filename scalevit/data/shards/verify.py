"""`scalevit shards verify`: everything that can be wrong with shards, shard by shard, without stopping at the first.

Knows tars, descriptions and images; must not know orders or loaders.
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
from scalevit.data import workers as processes
from scalevit.data.faults import Fault
from scalevit.data.shards.labels import DEFAULT_KEY
from scalevit.data.shards.samples import Description, Row, Scan, describe_shard, scan_shard
from scalevit.data.storage.files import ShardFile, open_shard
from scalevit.errors import UserError
from scalevit.terminal import ProgressBar


@dataclass
class ShardReport:
    """What was found in one shard."""

    path: str
    expected: int | None = None
    """Samples by its description, None where there is none."""
    good: int = 0
    """Samples that are whole, labelled and decodable."""
    faults: list[Fault] = field(default_factory=list)
    """One for each bad sample, each break of the tar and each difference from the description."""
    notes: Counter[str] = field(default_factory=Counter)
    """What is no fault and may surprise: formats that differ from their names, grey or CMYK images, 1 x 1, ..."""
    labels: Counter[int] = field(default_factory=Counter)
    checksums: bool = False
    """Whether there are any to compare the images with: without, a flipped byte that still decodes is not seen."""


def verify_shards(
    paths: Sequence[str],
    *,
    label_key: str = DEFAULT_KEY,
    num_classes: int | None = None,
    decode: bool = True,
    workers: int = 0,
) -> Iterator[ShardReport]:
    """Reads and checks shards, with progress on standard error; yields one report for each, in their order.

    Args:
        paths: of `locations.find_shards`.
        label_key: of labels in `.json` members.
        num_classes: labels must be below it.
        decode: whether images are decoded and compared with their checksums, which takes most of the time.
        workers: processes; 0 does it in this one.
    """
    check = partial(verify_shard, label_key=label_key, num_classes=num_classes, decode=decode)
    with ProgressBar("verifying", len(paths), "shards") as counter:
        if workers == 0:
            for path in paths:
                yield check(path)
                counter.advance()
            return
        context = processes.worker_context(("scalevit.data.shards.verify",))
        with ProcessPoolExecutor(workers, mp_context=context, initializer=processes.initialise_worker) as pool:
            with processes.hidden_main():
                futures: list[Future[ShardReport]] = [pool.submit(check, path) for path in paths]
            for future in futures:
                yield future.result()
                counter.advance()


def verify_shard(path: str, *, label_key: str, num_classes: int | None, decode: bool) -> ShardReport:
    """Checks one shard: counts, header chain, end of archive, checksums, labels, decodability."""
    report = ShardReport(path)
    try:
        with closing(open_shard(path)) as file:
            description = describe_shard(path)
            scan = scan_shard(file, label_key, after_breaks=True)
            report.faults += scan.faults
            report.faults += [Fault(path, "", broken.offset, broken.reason) for broken in scan.breaks]
            _check_description(file, scan, description, report)
            known = report.checksums = description is not None and len(description.crc32) == len(scan.rows) > 0
            for number, row in enumerate(scan.rows):
                expected = description.crc32[number] if known and description else None
                reason = _sample_problem(file, row, expected, num_classes, decode, report.notes)
                if reason:
                    report.faults.append(Fault(path, row.key, row.offset, reason))
                else:
                    report.good += 1
                    report.labels[row.label] += 1
    except UserError as error:
        report.faults.append(Fault(path, "", 0, str(error)))
    report.faults.sort(key=lambda fault: fault.offset)
    return report


def _check_description(file: ShardFile, scan: Scan, description: Description | None, report: ShardReport) -> None:
    if description is None:
        if not scan.rows and not scan.faults:
            report.faults.append(Fault(file.path, "", 0, "holds no samples"))
        return
    report.expected = description.samples
    problems = []
    if description.size != file.size:
        problems.append(f"has {file.size} bytes, and {description.size} when it was written")
    if description.samples != (found := len(scan.rows) + len(scan.faults)):
        problems.append(f"holds {found} samples, and {description.samples} when it was written")
    elif description.classes != (labels := Counter(row.label for row in scan.rows)) and not scan.faults:
        label = next(n for n in {*labels, *description.classes} if labels[n] != description.classes.get(n, 0))
        problems.append(f"has {labels[label]} of label {label}, and {description.classes.get(label, 0)} when written")
    if _sha256(file) != description.sha256:
        problems.append("its bytes have changed since it was written (wrong SHA-256)")
    report.faults += [Fault(file.path, "", 0, problem) for problem in problems]


def _sha256(file: ShardFile) -> str:
    digest = hashlib.sha256()
    for offset in range(0, file.size, 1 << 22):
        digest.update(file.read(offset, 1 << 22))
    return digest.hexdigest()


def _sample_problem(
    file: ShardFile, row: Row, expected: int | None, num_classes: int | None, decode: bool, notes: Counter[str]
) -> str:
    """Why a sample is bad, or nothing; adds to the notes."""
    if row.label < 0 or (num_classes is not None and row.label >= num_classes):
        limit = "0 or more" if num_classes is None else f"in 0..{num_classes - 1}"
        return f"label {row.label} is not {limit}"
    if not decode:
        return ""
    payload = file.read(row.offset, row.size)
    if expected is not None and crc32(payload) != expected:
        return "the image's bytes have changed (wrong checksum)"
    try:
        with images.open_image(payload) as image:
            named, actual = images.KINDS[row.kind], (image.format or "?").lower()
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
