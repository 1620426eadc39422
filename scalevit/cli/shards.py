"""`scalevit shards`: the arguments and what they do; `scalevit.cli.main` mounts them. Must not import torch."""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from scalevit.data.images import Resize
from scalevit.data.order import read_plan as plan
from scalevit.data.shards.labels import DEFAULT_KEY
from scalevit.data.writing.sources import DatasetsSource, ShardSource, Source, csv_file, image_folder
from scalevit.data.writing.writer import DEFAULT_SHARD_SIZE, WriteSettings, check_destination, write_shards
from scalevit.errors import UserError

_SHOWN_FAULTS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions of `scalevit shards` to its parser."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_write(actions.add_parser("write", help="make shards from images, a CSV, other shards or a data set"))

    index = actions.add_parser("index", help="index shards, also of other makers, so that runs start at once")
    _add_shards(index)
    index.add_argument("--checksums", action="store_true", help="read all images once and keep their checksums")
    index.set_defaults(run_action=_index)

    verify = actions.add_parser("verify", help="check headers, counts, checksums, labels and images of shards")
    _add_shards(verify)
    verify.add_argument("--num-classes", type=int, help="labels must be below it")
    verify.add_argument("--no-decode", action="store_true", help="look at headers and descriptions alone")
    verify.add_argument("--workers", type=int, default=4, help="processes, 0 for none (default: %(default)s)")
    verify.add_argument("--report", help="file for all faults, one JSON object a line")
    verify.set_defaults(run_action=_verify)

    planning = actions.add_parser("plan", help="what reading a set will cost: index, cache, reads per node")
    plan.add_arguments(planning)
    planning.set_defaults(run_action=plan.run)


def run(arguments: argparse.Namespace) -> None:
    """Does what the arguments of `add_arguments` say.

    Raises:
        UserError: what the user gave cannot be used, or shards are damaged.
    """
    arguments.run_action(arguments)


def _add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="a folder of .tar files, a pattern with * or {000..146}, or an address")
    parser.add_argument("--label-key", default=DEFAULT_KEY, help="of labels in .json members (default: %(default)s)")


# --- write ------------------------------------------------------------------------------------------------


def _add_write(write: argparse.ArgumentParser) -> None:
    source = write.add_mutually_exclusive_group(required=True)
    source.add_argument("--source", help="folder with one subfolder of images per class; their names become labels")
    source.add_argument("--csv", help="file with the columns path (relative to it) and label")
    source.add_argument("--shards", help="shards of any maker, to be written anew: folder, pattern or address")
    source.add_argument("--datasets", help="folder of a Hugging Face data set (save_to_disk)")
    write.add_argument("--destination", required=True, help="folder to make; must be missing or empty")
    write.add_argument(
        "--shard-size", type=int, default=DEFAULT_SHARD_SIZE, help="images per shard (default: %(default)s)"
    )
    write.add_argument("--seed", type=int, default=0, help="of the shuffle over the shards (default: %(default)s)")
    write.add_argument("--workers", type=int, default=4, help="processes, 0 for none (default: %(default)s)")
    side = write.add_mutually_exclusive_group()
    side.add_argument("--shortest-side", type=int, help="shrink larger images to so many pixels, as JPEG")
    side.add_argument("--longest-side", type=int, help="likewise, by the other side")
    write.add_argument("--quality", type=int, default=90, help="of those JPEGs, 1 to 100 (default: %(default)s)")
    write.add_argument(
        "--max-faults", type=int, default=0, help="leave out up to so many bad images (default: %(default)s)"
    )
    write.add_argument("--label-key", default=DEFAULT_KEY, help="--shards: of labels in .json (default: %(default)s)")
    write.add_argument("--split", help="--datasets: which split")
    write.add_argument("--image-column", default="image", help="--datasets: column of images (default: %(default)s)")
    write.add_argument("--label-column", default="label", help="--datasets: column of labels (default: %(default)s)")
    write.set_defaults(run_action=_write)


def _write(arguments: argparse.Namespace) -> None:
    for name, lowest in (
        ("shard_size", 1), ("workers", 0), ("shortest_side", 1), ("longest_side", 1), ("quality", 1), ("max_faults", 0),
    ):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name.replace('_', '-')} = {value}: must be at least {lowest}")
    if arguments.quality > 100:
        raise UserError(f"--quality = {arguments.quality}: must be at most 100")
    check_destination(Path(arguments.destination))  # before the source is listed, which may take minutes
    resize = None
    if side := arguments.shortest_side or arguments.longest_side:
        resize = Resize(side, "shortest" if arguments.shortest_side else "longest", arguments.quality)
    settings = WriteSettings(arguments.shard_size, arguments.seed, resize, arguments.max_faults)
    write_shards(_source(arguments), arguments.destination, settings, workers=arguments.workers)


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.source:
        return image_folder(arguments.source)
    if arguments.csv:
        return csv_file(arguments.csv)
    if arguments.shards:
        return ShardSource(arguments.shards, arguments.label_key)
    return DatasetsSource(arguments.datasets, arguments.split, arguments.image_column, arguments.label_column)


# --- index and verify -------------------------------------------------------------------------------------


def _index(arguments: argparse.Namespace) -> None:
    from scalevit.data.shards.index import load_index, saved_path

    index = load_index(arguments.shards, label_key=arguments.label_key, checksums=arguments.checksums)
    for fault in index.faults[:_SHOWN_FAULTS]:
        print(fault)
    if len(index.faults) > _SHOWN_FAULTS:
        print(f"... and {len(index.faults) - _SHOWN_FAULTS} more; `scalevit shards verify --report` lists all")
    labels = len(set(index.label.tolist()))
    known = "with checksums" if (index.crc32 >= 0).all() else "without checksums"
    print(
        f"{len(index)} samples of {labels} labels in {len(index.shards)} shards, {known}; "
        f"{len(index.faults)} left out; index {saved_path(index.shards)}, fingerprint {index.fingerprint}"
    )


def _verify(arguments: argparse.Namespace) -> None:
    from scalevit.data.shards.discovery import find_shards
    from scalevit.data.shards.verify import verify_shards

    reports = verify_shards(
        find_shards(arguments.shards),
        label_key=arguments.label_key,
        num_classes=arguments.num_classes,
        decode=not arguments.no_decode,
        workers=arguments.workers,
    )
    shards = damaged = good = faults = unsure = 0
    notes: Counter[str] = Counter()
    try:
        file = open(arguments.report, "w", encoding="utf-8") if arguments.report else None  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--report {arguments.report}: cannot be written ({error.strerror})") from None
    try:
        for report in reports:
            shards, damaged, good = shards + 1, damaged + bool(report.faults), good + report.good
            notes += report.notes
            unsure += not report.checksums
            for fault in report.faults:
                faults += 1
                if faults <= _SHOWN_FAULTS or not file:
                    print(fault)
                if file:
                    file.write(json.dumps(asdict(fault)) + "\n")
    finally:
        if file:
            file.close()
    for note, count in sorted(notes.items()):
        print(f"note: {count} images: {note}")
    if unsure:
        print(f"note: {unsure} shards have no checksums: flipped bytes of images that still decode cannot be seen")
    print(f"{good} good samples in {shards} shards; {faults} faults", file=sys.stderr)
    if faults:
        listed = f"; all are listed in {arguments.report}" if file else ""
        raise UserError(f"shards at {arguments.shards}: {faults} faults in {damaged} of {shards} shards{listed}")
