"""`scalevit shards`: write, index, verify and plan. Arguments, library calls and printing; must not import torch."""

import argparse
import json
import sys
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TextIO, get_args

from scalevit.cli.parsing import integer
from scalevit.data.images import Resize
from scalevit.data.order.read_plan import ReadPlan, plan_reads
from scalevit.data.order.shuffle import CHUNK, LANES
from scalevit.data.shards.discovery import find_shards
from scalevit.data.shards.index import load_index, saved_path
from scalevit.data.shards.labels import DEFAULT_KEY
from scalevit.data.shards.verify import ShardReport, verify_shards
from scalevit.data.writing.sources import ClassOrder, DatasetsSource, ShardSource, Source, csv_file, image_folder
from scalevit.data.writing.writer import DEFAULT_SHARD_SIZE, WriteSettings, check_destination, write_shards
from scalevit.errors import SettingError, UserError
from scalevit.terminal import format_bytes

_PRINTED_FAULTS = 20
_PRINTED_CLASSES = 10
_HIGH_AMPLIFICATION = 1.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions of `scalevit shards` to its parser."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_write(actions.add_parser("write", help="write shards from images, a CSV file, other shards or a data set"))

    index = actions.add_parser("index", help="index shards, so that runs start without reading all headers")
    _add_shards(index)
    index.add_argument("--checksums", action="store_true", help="compute and save the checksums of all images")
    index.set_defaults(run_action=_index)

    verify = actions.add_parser("verify", help="check headers, counts, checksums, labels and images of shards")
    _add_shards(verify)
    verify.add_argument("--num-classes", type=integer(1), help="labels must be below it")
    verify.add_argument("--no-decode", action="store_true", help="check headers and metadata only")
    verify.add_argument("--workers", type=integer(0), default=4, help="processes, 0 for none (default: %(default)s)")
    verify.add_argument("--report", help="file for all faults, one JSON object per line")
    verify.set_defaults(run_action=_verify)

    planning = actions.add_parser("plan", help="what reading a set will cost: index, cache, reads per node")
    planning.add_argument("shards", nargs="?", help="existing shards; or describe a set by the next two")
    planning.add_argument("--samples", type=integer(1), help="number of images")
    planning.add_argument("--image-bytes", type=integer(1), default=110_000, help="mean size (default: %(default)s)")
    planning.add_argument("--nodes", type=integer(1), default=1, help="default: %(default)s")
    planning.add_argument("--global-batch", type=integer(1), default=1024, help="default: %(default)s")
    planning.set_defaults(run_action=_plan)


def run(arguments: argparse.Namespace) -> None:
    """Runs the action that `add_arguments` parsed.

    Raises:
        UserError: an argument is invalid, or shards are damaged.
    """
    arguments.run_action(arguments)


def _add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="a folder of .tar files, a pattern with * or {000..146}, or an address")
    parser.add_argument(
        "--label-key", default=DEFAULT_KEY, help="key of the label in .json members (default: %(default)s)"
    )


# --- write ------------------------------------------------------------------------------------------------


def _add_write(write: argparse.ArgumentParser) -> None:
    source = write.add_mutually_exclusive_group(required=True)
    source.add_argument("--source", help="folder with one subfolder of images per class")
    source.add_argument("--csv", help="file with the columns path (relative to it) and label")
    source.add_argument("--shards", help="existing shards, whatever tool wrote them: folder, pattern or address")
    source.add_argument("--datasets", help="folder of a Hugging Face data set (save_to_disk)")
    write.add_argument("--destination", required=True, help="folder to create; must not exist or be empty")
    write.add_argument(
        "--class-order",
        choices=get_args(ClassOrder),
        default=get_args(ClassOrder)[0],
        help="--source, --csv: how class names are sorted before they are numbered; torchvision: 0, 1, 10, 2; "
        "natural, as in timm: 0, 1, 2, 10 (default: %(default)s)",
    )
    write.add_argument(
        "--shard-size", type=integer(1), default=DEFAULT_SHARD_SIZE, help="images per shard (default: %(default)s)"
    )
    write.add_argument(
        "--seed", type=integer(0), default=0, help="of the shuffle over the shards (default: %(default)s)"
    )
    write.add_argument("--workers", type=integer(0), default=4, help="processes, 0 for none (default: %(default)s)")
    side = write.add_mutually_exclusive_group()
    side.add_argument(
        "--shortest-side", type=integer(1), help="shrink images whose shortest side is longer, to JPEG; pixels"
    )
    side.add_argument("--longest-side", type=integer(1), help="likewise for the longest side")
    write.add_argument(
        "--quality", type=integer(1, 100), default=90, help="of those JPEGs, 1 to 100 (default: %(default)s)"
    )
    write.add_argument(
        "--max-faults",
        type=integer(0),
        default=0,
        help="maximum number of bad images to leave out (default: %(default)s)",
    )
    write.add_argument("--label-key", default=DEFAULT_KEY, help="--shards: key in .json members (default: %(default)s)")
    write.add_argument("--split", help="--datasets: which split")
    write.add_argument("--image-column", default="image", help="--datasets: column of images (default: %(default)s)")
    write.add_argument("--label-column", default="label", help="--datasets: column of labels (default: %(default)s)")
    write.set_defaults(run_action=_write)


def _write(arguments: argparse.Namespace) -> None:
    check_destination(Path(arguments.destination))  # before the source is listed, which may take minutes
    resize = None
    if side := arguments.shortest_side or arguments.longest_side:
        resize = Resize(side, "shortest" if arguments.shortest_side else "longest", arguments.quality)
    settings = WriteSettings(arguments.shard_size, arguments.seed, resize, arguments.max_faults)
    try:
        source = _source(arguments)
        write_shards(source, arguments.destination, settings, workers=arguments.workers)
    except SettingError as error:
        options = {"max_faults": "--max-faults", "split": "--split"}
        options |= {"image": "--image-column", "label": "--label-column"}
        raise UserError(f"{options[error.argument]} = {error.value}: {error.reason}") from None
    if source.classes is not None:
        numbered = [f"{number} = {name}" for number, name in enumerate(source.classes[:_PRINTED_CLASSES])]
        more = ", ..." if len(source.classes) > _PRINTED_CLASSES else ""
        print(f"labels of the {len(source.classes)} classes (all in set.json): {', '.join(numbered)}{more}")


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.source:
        return image_folder(arguments.source, arguments.class_order)
    if arguments.csv:
        return csv_file(arguments.csv, arguments.class_order)
    if arguments.shards:
        return ShardSource(arguments.shards, arguments.label_key)
    return DatasetsSource(arguments.datasets, arguments.split, arguments.image_column, arguments.label_column)


# --- index and verify -------------------------------------------------------------------------------------


def _index(arguments: argparse.Namespace) -> None:
    index = load_index(arguments.shards, label_key=arguments.label_key, checksums=arguments.checksums)
    for fault in index.faults[:_PRINTED_FAULTS]:
        print(fault)
    if len(index.faults) > _PRINTED_FAULTS:
        print(f"... and {len(index.faults) - _PRINTED_FAULTS} more; `scalevit shards verify --report` lists all")
    labels = len(set(index.label.tolist()))
    known = "with checksums" if (index.crc32 >= 0).all() else "without checksums"
    print(
        f"{len(index)} samples of {labels} labels in {len(index.shards)} shards, {known}; "
        f"{len(index.faults)} left out; index {saved_path(index.shards)}, fingerprint {index.fingerprint}"
    )


def _verify(arguments: argparse.Namespace) -> None:
    reports = verify_shards(
        find_shards(arguments.shards),
        label_key=arguments.label_key,
        num_classes=arguments.num_classes,
        decode=not arguments.no_decode,
        workers=arguments.workers,
    )
    finished: list[ShardReport] = []
    with _open_report(arguments.report) as file:
        for report in reports:
            before = sum(len(other.faults) for other in finished)
            for number, fault in enumerate(report.faults, before):
                if file is None or number < _PRINTED_FAULTS:
                    print(fault)
                if file is not None:
                    file.write(json.dumps(asdict(fault)) + "\n")
            finished.append(report)
    _print_summary(finished, arguments.shards, arguments.report)


def _open_report(path: str | None) -> AbstractContextManager[TextIO | None]:
    try:
        return nullcontext() if path is None else open(path, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--report {path}: cannot be written ({error.strerror})") from None


def _print_summary(reports: list[ShardReport], shards: str, listed_in: str | None) -> None:
    """Prints the result of verification except the faults.

    Raises:
        UserError: there are faults.
    """
    notes = sum((report.notes for report in reports), Counter[str]())
    for note, count in sorted(notes.items()):
        print(f"note: {count} images: {note}")
    if unchecked := sum(not report.checksums for report in reports):
        print(f"note: {unchecked} shards have no checksums: flipped bytes in images that still decode are not detected")
    good = sum(report.good for report in reports)
    faults = sum(len(report.faults) for report in reports)
    print(f"{good} good samples in {len(reports)} shards; {faults} faults", file=sys.stderr)
    if faults:
        damaged = sum(bool(report.faults) for report in reports)
        more = f"; all are listed in {listed_in}" if listed_in else ""
        raise UserError(f"shards at {shards}: {faults} faults in {damaged} of {len(reports)} shards{more}")


# --- plan -------------------------------------------------------------------------------------------------


def _plan(arguments: argparse.Namespace) -> None:
    if (arguments.shards is None) == (arguments.samples is None):
        raise UserError("give either shards or --samples")
    if arguments.shards is None:
        samples, total_bytes = arguments.samples, arguments.samples * arguments.image_bytes
    else:
        index = load_index(arguments.shards)
        samples, total_bytes = len(index), int(index.size.sum())
    _print_plan(plan_reads(samples, total_bytes, nodes=arguments.nodes, global_batch=arguments.global_batch))


def _print_plan(plan: ReadPlan) -> None:
    reads = format_bytes(plan.reads_per_node * plan.chunk_bytes)
    print(f"samples            {plan.samples:,} ({format_bytes(plan.total_bytes)})")
    print(f"index              {format_bytes(plan.index_bytes)} on disk and in each process")
    print(f"chunks             {plan.chunks:,} of {CHUNK} samples, about {format_bytes(plan.chunk_bytes)} each")
    print(f"reads per node     {plan.reads_per_node:,} per epoch, {reads}, on each of {plan.nodes} nodes")
    print(f"cache per node     {format_bytes(plan.cache_bytes)}")
    print(f"read amplification {plan.amplification:.2f}")
    if plan.amplification > _HIGH_AMPLIFICATION:
        print(f"with a global batch that is a multiple of {LANES}, nodes read fewer chunks in common")
