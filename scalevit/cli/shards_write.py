"""`scalevit shards write`: from images of any origin to shards. Arguments, library calls and printing."""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from scalevit.cli.label_format import label_format
from scalevit.cli.parsing import integer
from scalevit.data.images import Resize
from scalevit.data.shards.labels import DEFAULT_KEY
from scalevit.data.writing.sources.archives import class_archives, flat_images
from scalevit.data.writing.sources.base import Source
from scalevit.data.writing.sources.classes import ClassOrder, ClassSettings, read_class_names, read_label_map
from scalevit.data.writing.sources.datasets import SAVED_FILES, DatasetsSource
from scalevit.data.writing.sources.files import image_folder, table_file
from scalevit.data.writing.sources.idx import IdxSource, is_idx
from scalevit.data.writing.sources.shards import ShardSource
from scalevit.data.writing.writer import DEFAULT_SHARD_SIZE, WriteSettings, check_destination, write_shards
from scalevit.errors import SettingError, UserError

_PRINTED_CLASSES = 10
_PRINTED_LEFT_OUT = 20
_OPTIONS = {
    "max_faults": "--max-faults",
    "split": "--split",
    "image": "--image-column",
    "label": "--label-column",
    "path_column": "--image-column",
    "label_column": "--label-column",
}
_CLASSES = ("class_order", "class_names", "label_map", "convert")
_COLUMNS = ("image_column", "label_column")
# The options that each source uses.
_USED = {
    "source": _CLASSES,
    "table": (*_CLASSES, *_COLUMNS),
    "class_archives": _CLASSES,
    "images": (*_CLASSES, "labels"),
    "shards": ("class_names", "label_key"),
    "datasets": (*_CLASSES, *_COLUMNS, "split"),
    "parquet": (*_CLASSES, *_COLUMNS),
}
EXAMPLES = """\
  scalevit shards write --source photos/train --destination data/train --workers 8
  scalevit shards write --table list.csv --image-column file --label-column class --destination data/train
  scalevit shards write --class-archives ILSVRC2012_img_train.tar --destination data/imagenet/train
  scalevit shards write --images ILSVRC2012_img_val.tar --labels ILSVRC2012_devkit_t12.tar.gz --destination \\
      data/imagenet/validation
  scalevit shards write --parquet 'train-*.parquet' --label-column fine_label --destination data/train
  scalevit shards write --images images-idx3-ubyte.gz --labels labels-idx1-ubyte.gz --destination data/train"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the action."""
    _add_sources(parser)
    parser.add_argument("--destination", required=True, help="folder to create; must not exist or be empty")
    _add_classes(parser)
    parser.add_argument(
        "--shard-size", type=integer(1), default=DEFAULT_SHARD_SIZE, help="images per shard (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=integer(0), default=0, help="of the shuffle over the shards (default: %(default)s)"
    )
    parser.add_argument("--workers", type=integer(0), default=4, help="processes, 0 for none (default: %(default)s)")
    side = parser.add_mutually_exclusive_group()
    side.add_argument(
        "--shortest-side",
        type=integer(1),
        help="shrink images whose shortest side is longer, to JPEG; pixels. Also takes images of over 89 megapixels",
    )
    side.add_argument("--longest-side", type=integer(1), help="likewise for the longest side")
    parser.add_argument(
        "--quality", type=integer(1, 100), default=90, help="of those JPEGs, 1 to 100 (default: %(default)s)"
    )
    parser.add_argument("--convert", action="store_true", help="write .gif (first image), .bmp and .tiff files as .png")
    parser.add_argument(
        "--check",
        choices=("whole", "header"),
        default="whole",
        help="how much of each image is decoded to find bad ones (default: %(default)s)",
    )
    parser.add_argument(
        "--max-faults",
        type=integer(0),
        default=0,
        help="maximum number of bad images to leave out (default: %(default)s)",
    )
    parser.set_defaults(run_action=_write)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--source", help="folder with one subfolder of images per class")
    source.add_argument("--table", "--csv", help=".csv or .tsv file with a column of paths (relative to it) and labels")
    source.add_argument("--class-archives", help="ImageNet's archives: a folder, or a tar, with one tar per class")
    source.add_argument("--images", help="folder, tar or IDX file of images without classes, which --labels has")
    source.add_argument("--shards", help="existing shards, whatever tool wrote them: folder, pattern or address")
    source.add_argument("--datasets", help="Hugging Face data set: a folder (save_to_disk), or OWNER/NAME on the hub")
    source.add_argument("--parquet", help="Parquet files with a column of images: a file, folder or pattern")
    parser.add_argument(
        "--labels",
        help="--images: ImageNet's development kit, a text file with an image and its class per line, or an IDX file",
    )
    parser.add_argument("--label-key", help=f"--shards: key in .json members (default: {DEFAULT_KEY})")
    parser.add_argument("--split", help="--datasets: which split")
    parser.add_argument(
        "--image-column", help="--table: column of paths (default: path); --datasets, --parquet: of images (image)"
    )
    parser.add_argument("--label-column", help="likewise, column of labels (default: label)")


def _add_classes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--class-order",
        choices=get_args(ClassOrder),
        help="how class names are sorted before they are numbered; torchvision (default): 0, 1, 10, 2; natural, as in "
        "timm: 0, 1, 2, 10",
    )
    parser.add_argument("--class-names", metavar="FILE", help="names of labels 0, 1, ..., one per line, instead")
    parser.add_argument(
        "--label-map", metavar="FILE", help="class of each name in the source: lines of two columns, or JSON"
    )


def _write(arguments: argparse.Namespace) -> None:
    check_destination(Path(arguments.destination))  # before the source is listed, which may take minutes
    resize = None
    if side := arguments.shortest_side or arguments.longest_side:
        resize = Resize(side, "shortest" if arguments.shortest_side else "longest", arguments.quality)
    settings = WriteSettings(arguments.shard_size, arguments.seed, resize, arguments.max_faults, check=arguments.check)
    try:
        source = _source(arguments)
        bad = write_shards(source, arguments.destination, settings, workers=arguments.workers)
    except SettingError as error:
        raise UserError(f"{_OPTIONS[error.argument]} = {error.value}: {error.reason}") from None
    _report(source, bad, arguments.destination)


def _source(arguments: argparse.Namespace) -> Source:
    if (arguments.images is None) != (arguments.labels is None):
        raise UserError("--images and --labels belong together: images without class folders, and their classes")
    classes = ClassSettings(
        arguments.class_order or get_args(ClassOrder)[0],
        None if arguments.class_names is None else read_class_names(arguments.class_names),
        None if arguments.label_map is None else read_label_map(arguments.label_map),
    )
    _refuse_unused(arguments)
    convert, label = arguments.convert, arguments.label_column or "label"
    if arguments.source:
        return image_folder(arguments.source, classes, convert=convert)
    if arguments.table:
        path = arguments.image_column or "path"
        return table_file(arguments.table, classes, path_column=path, label_column=label, convert=convert)
    if arguments.class_archives:
        return class_archives(arguments.class_archives, classes, convert=convert)
    if arguments.images and is_idx(arguments.images):
        return IdxSource(arguments.images, arguments.labels, classes)
    if arguments.images:
        return flat_images(arguments.images, arguments.labels, classes, convert=convert)
    if arguments.shards:
        return ShardSource(arguments.shards, label_format(arguments), max_faults=arguments.max_faults)
    columns = {"image": arguments.image_column or "image", "label": label, "classes": classes, "convert": convert}
    if arguments.parquet:
        return DatasetsSource.from_parquet(arguments.parquet, **columns)
    saved = any(os.path.exists(os.path.join(arguments.datasets, name)) for name in SAVED_FILES)
    read = DatasetsSource.from_disk if saved else DatasetsSource.from_hub
    return read(arguments.datasets, arguments.split, **columns)


def _refuse_unused(arguments: argparse.Namespace) -> None:
    """Finds options that the chosen source does not use.

    Raises:
        UserError: names the first.
    """
    source = next(name for name in _USED if getattr(arguments, name))
    for option in dict.fromkeys(option for options in _USED.values() for option in options):
        if getattr(arguments, option) and option not in _USED[source]:
            shown, users = (
                text.replace("_", "-")
                for text in (option, ", --".join(name for name, options in _USED.items() if option in options))
            )
            raise UserError(f"--{shown} is not used with --{source.replace('_', '-')}, only with --{users}")


def _report(source: Source, bad: Sequence[str], destination: str) -> None:
    for reason, count in Counter(entry.reason for entry in source.left_out).most_common():
        print(f"left out: {count} x {reason}")
    _print_first([entry.path for entry in source.left_out])
    if bad:
        print(f"bad images, left out: {len(bad)}")
        _print_first(bad)
    print(f"{len(source) - len(bad):,} images in {destination}")
    if source.classes is not None:
        numbered = [f"{number} = {name}" for number, name in enumerate(source.classes[:_PRINTED_CLASSES])]
        more_names = ", ..." if len(source.classes) > _PRINTED_CLASSES else ""
        print(f"labels of the {len(source.classes)} classes (all in set.json): {', '.join(numbered)}{more_names}")


def _print_first(lines: Sequence[str]) -> None:
    for line in lines[:_PRINTED_LEFT_OUT]:
        print(f"  {line}")
    if more := len(lines[_PRINTED_LEFT_OUT:]):
        print(f"  ... and {more} more, all in set.json")
