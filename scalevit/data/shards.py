"""Writing WebDataset shards: plain tars that webdataset, tarfile and timm read.

Each sample is two members, `KEY.jpg` (or another kind of `images.KINDS`) and `KEY.cls` with the label in ASCII digits.
Beside each `shard-000000.tar` stands a `shard-000000.json` with its count, size, SHA-256 and class histogram, and in
each set one `classes.json`. The same input, settings and seed give the same bytes. A set appears under its name only
when it is complete: until then it is `NAME.partial`. Knows files and images; must not know torch.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from scalevit import progress
from scalevit.data import images, processes
from scalevit.data.order import permutation
from scalevit.errors import UserError

DEFAULT_SHARD_SIZE = 8192

# (key, extension, payload, label)
Sample = tuple[str, str, bytes, int]


class SourceImage(NamedTuple):
    """One file of an image folder."""

    path: Path
    key: str
    label: int


def write_samples(
    samples: Iterable[Sample],
    destination: str | os.PathLike[str],
    *,
    total: int,
    shard_size: int = DEFAULT_SHARD_SIZE,
    classes: Sequence[str] | None = None,
) -> None:
    """Writes samples in the given order (shuffle them first: see `order.permutation`).

    Args:
        samples: (key, extension, payload, label); keys are unique and hold no dot.
        destination: folder to make; must be missing or empty.
        total: how many samples there are; another number is an error.
        shard_size: samples per shard; the last may hold fewer.
        classes: names of the labels 0.., written to `classes.json`.

    Raises:
        UserError: the destination is not empty or cannot be written.
    """
    target = Path(destination)
    check_destination(target)
    partial_folder = target.with_name(target.name + ".partial")
    try:
        # What an interrupted call left behind is written anew: it may come from other settings.
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        with progress.Counter(f"writing {target}", total, "samples") as counter:
            iterator = iter(samples)
            for number in range(-(-total // shard_size)):
                chunk = islice(iterator, shard_size)
                counter_chunk = _counted(chunk, counter)
                _write_shard(partial_folder / f"shard-{number:06d}.tar", counter_chunk)
            if counter.done != total or next(iterator, None) is not None:
                raise ValueError(f"expected {total} samples, got {'more' if counter.done == total else counter.done}")
        if classes is not None:
            _write_file(partial_folder / "classes.json", _json({"classes": list(classes)}))
        _sync(partial_folder)
        os.rename(partial_folder, target)
        _sync(target.parent)
    except OSError as error:
        raise UserError(f"shards at {target}: cannot be written ({error.strerror or error})") from None


def write_image_folder(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    seed: int = 0,
    workers: int = 0,
    shortest_side: int | None = None,
    quality: int = 90,
) -> None:
    """Writes a folder with one subfolder per class; sorted names become the labels 0.. (torchvision's ImageFolder).

    Args:
        source: the image folder.
        destination: folder to make; must be missing or empty.
        shard_size: samples per shard.
        seed: of the shuffle that spreads the classes over the shards.
        workers: processes that read and re-encode; 0 does it in this one. The result does not depend on it.
        shortest_side: shrink larger images to this many pixels, as JPEG; the others are copied unchanged.
        quality: of that JPEG.

    Raises:
        UserError: no images, a file that is not an image, or a destination that is not empty.
    """
    check_destination(Path(destination))
    classes, found = list_image_folder(Path(source))
    shuffled = [found[index] for index in permutation(len(found), seed)]
    load = partial(_load, shortest_side=shortest_side, quality=quality)
    samples = _map_in_order(load, shuffled, workers)
    write_samples(samples, destination, total=len(found), shard_size=shard_size, classes=classes)


def list_image_folder(source: Path) -> tuple[list[str], list[SourceImage]]:
    """The class names and the images of a folder, both sorted.

    Raises:
        UserError: no class folder, a class without images, or files that would be left out.
    """
    if not source.is_dir():
        raise UserError(f"images at {source}: no such folder; give a folder with one subfolder of images per class")
    classes = sorted(entry.name for entry in source.iterdir() if entry.is_dir())
    if not classes:
        raise UserError(f"images at {source}: no subfolders; give a folder with one subfolder of images per class")
    found: list[SourceImage] = []
    others: list[Path] = []
    for label, name in enumerate(classes):
        before = len(found)
        for folder, subfolders, names in os.walk(source / name, followlinks=True):
            subfolders.sort()
            for path in (Path(folder, file) for file in sorted(names)):
                if path.suffix[1:].lower() in images.KINDS:
                    # The number makes the key unique, the name lets a person find the file again.
                    stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:80]
                    found.append(SourceImage(path, f"{len(found):09d}-{stem}", label))
                else:
                    others.append(path)
        if len(found) == before:
            raise UserError(f"images at {source / name}: none of .{', .'.join(images.KINDS)}; every class needs images")
    if others:
        raise UserError(
            f"images at {source}: {len(others)} files are not .{', .'.join(images.KINDS)}, first {others[0]}; "
            "convert or remove them"
        )
    return classes, found


def check_destination(destination: Path) -> None:
    """Raises UserError unless shards may be written there."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"shards at {destination}: not an empty folder; remove it or name another destination")
    if destination.is_mount():
        raise UserError(f"shards at {destination}: a mount point cannot be replaced; name a folder below it")


# --- one shard --------------------------------------------------------------------------------------------


def _write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """A tar and its JSON, each complete and on the disk before it has its name."""
    import webdataset  # brings torch, which takes seconds and which the processes that read have no use for

    histogram: Counter[int] = Counter()
    temporary = path.with_suffix(".tar.tmp")
    with open(temporary, "wb") as file:
        # Fixed times, owners and modes: the same samples are the same bytes. `encoder=False` writes bytes as they are.
        with webdataset.TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
            for key, extension, payload, label in samples:
                if "." in key or extension not in images.KINDS:
                    raise ValueError(f"not a sample's name: {key}.{extension}")
                tar.write({"__key__": key, extension: payload, "cls": str(label).encode("ascii")})
                histogram[label] += 1
        file.flush()
        os.fsync(file.fileno())
    with open(temporary, "rb") as file:
        sha256 = hashlib.sha256()
        while block := file.read(1 << 20):
            sha256.update(block)
    about = {
        "count": histogram.total(),
        "size": temporary.stat().st_size,
        "sha256": sha256.hexdigest(),
        "classes": {str(label): histogram[label] for label in sorted(histogram)},
    }
    os.rename(temporary, path)
    _write_file(path.with_suffix(".json"), _json(about))


def _write_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _sync(folder: Path) -> None:
    """Makes the names in a folder as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _counted(samples: Iterable[Sample], counter: progress.Counter) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        counter.advance()


# --- reading the sources ----------------------------------------------------------------------------------


def _load(image: SourceImage, shortest_side: int | None, quality: int) -> Sample:
    extension = image.path.suffix[1:].lower()
    try:
        payload = image.path.read_bytes()
        smaller = images.shrink(payload, shortest_side, quality) if shortest_side else None
        if shortest_side is None:
            images.check_header(payload)
    except OSError as error:
        raise UserError(f"image {image.path}: cannot be read ({error.strerror})") from None
    except images.UndecodableImage as error:
        raise UserError(f"image {image.path}: cannot be decoded ({error}); replace or remove it") from None
    return (image.key, extension, payload, image.label) if smaller is None else (image.key, "jpg", smaller, image.label)


def _map_in_order(
    function: Callable[[SourceImage], Sample], items: Sequence[SourceImage], workers: int
) -> Iterator[Sample]:
    """`map`, by processes that stay a bounded number of results ahead (a pool's own `map` has no bound)."""
    if workers == 0:
        yield from map(function, items)
        return
    pending: deque[Future[Sample]] = deque()
    context = processes.worker_context(("scalevit.data.shards",))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=processes.initialise_worker) as pool:
        try:
            for item in items:
                with processes.hidden_main():  # the pool starts its processes at the first submit
                    pending.append(pool.submit(function, item))
                if len(pending) > 16 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
