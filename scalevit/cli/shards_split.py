"""`scalevit shards split`: a training and a validation set from one set. Arguments, library calls and printing."""

import argparse
from pathlib import Path

import numpy as np

from scalevit.cli.label_format import add_label_format, label_format
from scalevit.cli.parsing import fraction, integer
from scalevit.data.shards.index import Index
from scalevit.data.writing.sources.shards import ShardSource
from scalevit.data.writing.sources.subset import SubsetSource, stratified
from scalevit.data.writing.writer import DEFAULT_SHARD_SIZE, WriteSettings, check_destination, write_shards
from scalevit.errors import UserError

EXAMPLES = """\
  scalevit shards split data/photos --destination data/split    # 10 % of each class for validation
  scalevit shards split data/photos --destination data/split --validation 0.2 --seed 1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the action."""
    parser.add_argument("shards", help="a folder of .tar files, a pattern with * or {000..146}, or an address")
    parser.add_argument("--destination", required=True, help="folder for the new sets `train` and `validation`")
    parser.add_argument(
        "--validation",
        type=fraction,
        default=0.1,
        help="share of each class for validation, at least one image (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=integer(0), default=0, help="of the choice and of the order (default: %(default)s)"
    )
    parser.add_argument(
        "--shard-size", type=integer(1), default=DEFAULT_SHARD_SIZE, help="images per shard (default: %(default)s)"
    )
    parser.add_argument(
        "--max-faults",
        type=integer(0),
        default=0,
        help="maximum number of samples that cannot be used and are left out (default: %(default)s)",
    )
    parser.add_argument("--workers", type=integer(0), default=4, help="processes, 0 for none (default: %(default)s)")
    add_label_format(parser)
    parser.set_defaults(run_action=_split)


def _split(arguments: argparse.Namespace) -> None:
    destination = Path(arguments.destination)
    for name in ("train", "validation"):
        check_destination(destination / name)
    source = ShardSource(arguments.shards, label_format(arguments), max_faults=arguments.max_faults)
    index = source.index
    validation = stratified(index.label, _contents(index), share=arguments.validation, seed=arguments.seed)
    if not validation.any():
        raise UserError(f"shards at {arguments.shards}: no class has two different images")
    settings = WriteSettings(arguments.shard_size, arguments.seed, check="none")
    for name, chosen in (("train", ~validation), ("validation", validation)):
        write_shards(
            SubsetSource(source, np.flatnonzero(chosen)), destination / name, settings, workers=arguments.workers
        )
    labels = np.unique(index.label)
    alone = np.setdiff1d(labels, index.label[validation])
    print(
        f"{int((~validation).sum())} images for training, {int(validation.sum())} for validation, "
        f"of {len(labels)} classes"
    )
    if len(alone):
        names = [index.class_of(int(label)) for label in alone[:10]]
        more = ", ..." if len(alone) > 10 else ""
        print(f"{len(alone)} classes have no two different images, and none for validation: {', '.join(names)}{more}")


def _contents(index: Index) -> np.ndarray:
    """Numbers that are equal for equal images, by size and checksum; all different without checksums."""
    if (index.crc32 < 0).any():
        return np.arange(len(index))
    return (index.size << 32) | index.crc32
