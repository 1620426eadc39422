"""`scalevit shards`: write, split, show, index, verify and plan. Arguments, library calls and printing.

Must not import torch at module level.
"""

import argparse
import json
import sys
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TextIO

from scalevit.cli import shards_show, shards_split, shards_write
from scalevit.cli.label_format import add_label_format, label_format
from scalevit.cli.parsing import add_action, integer
from scalevit.data.order.read_plan import ReadPlan, plan_reads
from scalevit.data.order.shuffle import CHUNK, LANES
from scalevit.data.shards.discovery import find_shards
from scalevit.data.shards.index import load_index, saved_path
from scalevit.data.shards.verify import ShardReport, verify_shards
from scalevit.errors import UserError
from scalevit.terminal import format_bytes

_PRINTED_FAULTS = 20
_HIGH_AMPLIFICATION = 1.05
_INDEX = """\
  scalevit shards index data/train --checksums"""
_VERIFY = """\
  scalevit shards verify data/train --num-classes 1000 --workers 8
  scalevit shards verify 'data/train/{000..146}.tar' --report faults.jsonl"""
_PLAN = """\
  scalevit shards plan data/train --nodes 4
  scalevit shards plan --samples 1281167 --image-bytes 110000 --nodes 4    # before it is written"""
EXAMPLES = f"""\
  scalevit shards write --source photos/train --destination data/train
  scalevit shards split data/photos --destination data/split --validation 0.1
  scalevit shards show data/train --sheet samples.png
{_INDEX}
{_VERIFY}
{_PLAN}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions of `scalevit shards` to its parser."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    purpose = "write shards from images, archives, a table, other shards or a data set"
    shards_write.add_arguments(add_action(actions, "write", purpose, shards_write.EXAMPLES))

    purpose = "split a set into training and validation, the same share of each class"
    shards_split.add_arguments(add_action(actions, "split", purpose, shards_split.EXAMPLES))

    purpose = "print classes, sizes and kinds of images, and draw samples before and after augmentation"
    shards_show.add_arguments(add_action(actions, "show", purpose, shards_show.EXAMPLES))

    index = add_action(actions, "index", "index shards, so that runs start without reading all headers", _INDEX)
    _add_shards(index)
    index.add_argument("--checksums", action="store_true", help="compute and save the checksums of all images")
    index.set_defaults(run_action=_index)

    verify = add_action(actions, "verify", "check headers, counts, checksums, labels and images of shards", _VERIFY)
    _add_shards(verify)
    verify.add_argument("--num-classes", type=integer(1), help="labels must be below it")
    verify.add_argument("--no-decode", action="store_true", help="check headers and metadata only")
    verify.add_argument("--workers", type=integer(0), default=4, help="processes, 0 for none (default: %(default)s)")
    verify.add_argument("--report", help="file for all faults, one JSON object per line")
    verify.set_defaults(run_action=_verify)

    planning = add_action(actions, "plan", "estimate what reading a set costs: index, cache, reads per node", _PLAN)
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
    add_label_format(parser)


# --- index and verify -------------------------------------------------------------------------------------


def _index(arguments: argparse.Namespace) -> None:
    index = load_index(arguments.shards, labels=label_format(arguments), checksums=arguments.checksums)
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
        labels=label_format(arguments),
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
