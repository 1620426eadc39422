"""Writing WebDataset shards: plain tars that webdataset, tarfile and timm read.

Each sample has two members, `KEY.jpg` (or another kind of `images.KINDS`) and `KEY.cls` with the label in ASCII digits.
Each `shard-000000.tar` has a `shard-000000.json` beside it, and each set a `set.json`; docs/data.md describes both. The
same input, settings and seed give the same bytes. A set gets its name when it is complete; until then it is
`NAME.partial`, and a call with the same settings resumes it. Knows sources and files; must not know torch.
"""

import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal
from zlib import crc32

import numpy as np

from scalevit.data import images
from scalevit.data.order.shuffle import permutation
from scalevit.data.shards.discovery import SET_FILE
from scalevit.data.workers import initialise_worker, worker_context
from scalevit.data.writing.sources.base import Sample, Source
from scalevit.data.writing.sources.files import image_folder
from scalevit.data.writing.sources.memory import MemorySource
from scalevit.errors import SettingError, UserError
from scalevit.files import TEMPORARY_SUFFIX, fsync_path, lock, write_whole, writing_whole
from scalevit.terminal import ProgressBar

DEFAULT_SHARD_SIZE = 8192
_SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class WriteSettings:
    """How shards are written. Their bytes depend on these settings and the source only."""

    shard_size: int = DEFAULT_SHARD_SIZE
    """Samples per shard."""
    seed: int | None = 0
    """Seed of the shuffle that spreads the classes over the shards; None keeps the order of the source."""
    resize: images.Resize | None = None
    """Shrinks larger images, to JPEG; others are copied unchanged."""
    max_faults: int = 0
    """Maximum number of bad images, which are left out and listed in `set.json`."""
    check: Literal["whole", "header", "none"] = "whole"
    """How much of each image is decoded to find bad ones: all of it, or its header only."""


def write_samples(
    samples: Sequence[Sample],
    destination: str | os.PathLike[str],
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    classes: Sequence[str] | None = None,
) -> None:
    """Writes samples in the given order, without checking images (`order.shuffle.permutation` shuffles them).

    Args:
        samples: keys are unique and contain no dot.
        destination: as for `write_shards`.
        shard_size: samples per shard; the last may have fewer.
        classes: names of the labels 0...
    """
    write_shards(MemorySource(samples, classes), destination, WriteSettings(shard_size, seed=None, check="none"))


def write_image_folder(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], *, workers: int = 0, **settings: Any
) -> None:
    """`write_shards` of `sources.image_folder`; `settings` are those of `WriteSettings`."""
    write_shards(image_folder(source), destination, WriteSettings(**settings), workers=workers)


def write_shards(
    source: Source,
    destination: str | os.PathLike[str],
    settings: WriteSettings,
    *,
    workers: int = 0,
) -> list[str]:
    """Writes a set of shards, or resumes one that was interrupted.

    Args:
        source: the samples.
        destination: folder to create; must not exist or be empty.
        settings: how they are written.
        workers: processes that write a shard each; 0 writes in this one. The result does not depend on it.

    Returns:
        The bad images that were left out, each with its reason.

    Raises:
        SettingError: `max_faults`: there are more bad images.
        UserError: an image is bad, or the destination is not empty, in use, full, or was started with other settings.
    """
    target = Path(destination)
    check_destination(target)
    order = np.arange(len(source)) if settings.seed is None else permutation(len(source), settings.seed)
    count = -(-len(source) // settings.shard_size)
    folder = target.with_name(target.name + ".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock_set(folder):
            plan = {"source": source.fingerprint(), "samples": len(source), **_without_limits(settings)}
            _begin(folder, plan)
            done = [number for number in range(count) if _is_done(folder, number)]
            job = WriteJob(source, folder, order, settings)
            _write_all(job, [number for number in range(count) if number not in set(done)], done, workers)
            faults = _finish(folder, job, count, plan)
            os.rename(folder, target)
            fsync_path(target.parent)
            return faults
    except OSError as error:
        raise UserError(f"shards at {target}: cannot be written ({error.strerror or error})") from None


def check_destination(destination: Path) -> None:
    """Checks that shards can be written to a folder.

    Raises:
        UserError: it is not empty, no folder, or a mount point.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"shards at {destination}: not an empty folder; remove it or name another destination")
    if destination.is_mount():
        raise UserError(f"shards at {destination}: a mount point cannot be replaced; name a folder inside it")


# --- a set ------------------------------------------------------------------------------------------------


@dataclass
class WriteJob:
    """All that a process needs to write any shard of a set."""

    source: Source
    folder: Path
    order: np.ndarray
    settings: WriteSettings


def _without_limits(settings: WriteSettings) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name not in ("max_faults", "check")}


def _lock_set(folder: Path) -> BinaryIO:
    """Locks a set while it is written. The lock file is beside the folder, which is renamed under the lock.

    Raises:
        UserError: another process holds it.
    """
    try:
        return lock(folder.with_name(f".{folder.name}.lock"), wait=False)
    except BlockingIOError:
        raise UserError(f"shards at {folder}: another process is writing them; wait for it") from None


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Stores the settings, or checks that the shards in the folder were started with the same."""
    path = folder / _SETTINGS_FILE
    if path.exists():
        before = json.loads(path.read_text())
        differing = [name for name in plan if before.get(name) != plan[name]]
        if differing:
            changes = "; ".join(f"{name}: {before.get(name)} then, {plan[name]} now" for name in differing)
            raise UserError(
                f"shards at {folder}: were started with other settings ({changes}): remove that folder to start again"
            )
    else:
        # Without the settings nothing in the folder can be used.
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_whole(path, _json(plan))
    _remove_temporary_files(folder)


def _remove_temporary_files(folder: Path) -> None:
    for left_over in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        left_over.unlink(missing_ok=True)


def _is_done(folder: Path, number: int) -> bool:
    """The metadata marks a shard as complete: it is written after the tar."""
    tar = folder / _shard_name(number)
    try:
        return json.loads(tar.with_suffix(".json").read_text())["size"] == tar.stat().st_size
    except (OSError, ValueError, KeyError):
        return False


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _write_all(job: WriteJob, numbers: Sequence[int], done: Sequence[int], workers: int) -> None:
    size = job.settings.shard_size
    before = sum(min(size, len(job.source) - number * size) for number in done)
    faults = sum(len(_read_metadata(job.folder, number)["faults"]) for number in done)
    with ProgressBar(f"writing {job.folder.stem}", len(job.source), "samples", done=before) as counter:
        if workers == 0:
            for number in numbers:
                faults += _write_shard(job, number, counter.advance)
                _check_faults(faults, job)
            return
        context = worker_context(("scalevit.data.writing.writer",))
        written = context.Value("q", 0)
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_initialise_writer, initargs=(job, written))
        with pool:
            pending = {pool.submit(_work, number) for number in numbers}
            try:
                while pending:
                    ended, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    while counter.done < before + written.value:
                        counter.advance()
                    faults += sum(future.result() for future in ended)
                    _check_faults(faults, job)
                while counter.done < before + written.value:
                    counter.advance()
            finally:
                for future in pending:
                    future.cancel()


def _check_faults(faults: int, job: WriteJob) -> None:
    if faults > job.settings.max_faults:
        reason = (
            f"found {faults} bad images (listed in the .json files of {job.folder}): replace or remove them, or raise "
            "the limit"
        )
        raise SettingError("max_faults", job.settings.max_faults, reason)


def _finish(folder: Path, job: WriteJob, count: int, plan: dict[str, Any]) -> list[str]:
    """Describes the set; returns the reasons of its bad images."""
    shards = {_shard_name(number): _read_metadata(folder, number) for number in range(count)}
    faults = [fault for shard in shards.values() for fault in shard["faults"]]
    written = [name for name, shard in shards.items() if shard["count"]]
    if not written:
        raise UserError(f"shards at {folder}: none of the {len(job.source)} images can be used; {faults[0]['reason']}")
    about = {
        "format": 1,
        "samples": sum(shard["count"] for shard in shards.values()),
        "shards": written,
        "classes": None if job.source.classes is None else list(job.source.classes),
        "settings": plan,
        "faults": faults,
        "left_out": [entry._asdict() for entry in job.source.left_out],
    }
    write_whole(folder / SET_FILE, _json(about))
    for name in shards.keys() - set(written):  # all of its images are bad, and readers refuse a shard without samples
        (folder / name).unlink()
        (folder / name).with_suffix(".json").unlink()
    (folder / _SETTINGS_FILE).unlink()
    _remove_temporary_files(folder)
    fsync_path(folder)
    return [fault["reason"] for fault in faults]


def _read_metadata(folder: Path, number: int) -> dict[str, Any]:
    return json.loads((folder / _shard_name(number)).with_suffix(".json").read_text())


# --- one shard, in this process or a worker ---------------------------------------------------------------

_job: WriteJob | None = None
_written: Any = None


def _initialise_writer(job: WriteJob, written: Any) -> None:
    global _job, _written
    initialise_worker()
    _job, _written = job, written


def _work(number: int) -> int:
    assert _job is not None

    def advance() -> None:
        with _written.get_lock():
            _written.value += 1

    return _write_shard(_job, number, advance)


def _write_shard(job: WriteJob, number: int, advance: Callable[[], None]) -> int:
    """Writes a tar and its metadata, each flushed before it gets its name; returns the number of bad images."""
    path = job.folder / _shard_name(number)
    size = job.settings.shard_size
    histogram: Counter[int] = Counter()
    checksums: list[str] = []
    faults: list[dict[str, str]] = []
    with writing_whole(path) as temporary, open(temporary, "wb") as file:
        tar = _TarFile(file)
        for source_number in job.order[number * size : (number + 1) * size]:
            try:
                key, extension, payload, label = _prepared(job, int(source_number))
            except UserError as error:
                if job.settings.max_faults == 0:
                    raise UserError(f"{error}; replace or remove it, or allow bad images by --max-faults") from None
                faults.append({"sample": str(source_number), "reason": str(error)})
            else:
                tar.add(f"{key}.{extension}", payload)
                tar.add(f"{key}.cls", str(label).encode("ascii"))
                histogram[label] += 1
                checksums.append(f"{crc32(payload):08x}")
            advance()
        tar.end()
    about = {
        "format": 1,
        "count": histogram.total(),
        "size": tar.size,
        "sha256": tar.sha256.hexdigest(),
        "classes": {str(label): histogram[label] for label in sorted(histogram)},
        "payload_crc32": "".join(checksums),
        "faults": faults,
    }
    write_whole(path.with_suffix(".json"), _json(about))
    return len(faults)


def _prepared(job: WriteJob, number: int) -> Sample:
    key, extension, payload, label = job.source.load(number)
    resize, check = job.settings.resize, job.settings.check
    try:
        smaller = images.shrink(payload, resize) if resize else None
        if smaller is None and extension in images.CONVERTIBLE:
            payload, extension = images.to_png(payload), "png"
        if resize is None and check != "none":
            (images.check_whole if check == "whole" else images.check_header)(payload)
    except images.UndecodableImage as error:
        raise UserError(f"image {job.source.origin(number)}: cannot be decoded ({error})") from None
    return (key, extension, payload, label) if smaller is None else (key, "jpg", smaller, label)


class _TarFile:
    """Writes members with fixed times, owners and modes, so that the same samples give the same bytes."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def add(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(content), 0o644, 0
        self._write(info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE))

    def end(self) -> None:
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self.sha256.update(content)
        self.size += len(content)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
