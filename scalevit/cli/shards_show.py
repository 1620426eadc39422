"""`scalevit shards show`: what a set holds. Arguments, library calls and printing."""

import argparse
from pathlib import Path

import numpy as np

from scalevit.cli.label_format import add_label_format, label_format
from scalevit.cli.parsing import add_config, integer
from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.data.inspection.survey import Survey, survey
from scalevit.data.shards.index import Index, load_index
from scalevit.errors import UserError
from scalevit.terminal import format_bytes, narrow_table, print_table

EXAMPLES = """\
  scalevit shards show data/photos/train
  scalevit shards show data/photos/train --sheet samples.png --config photos.json data.transforms=fast"""
_PRINTED_CLASSES = 20
_LONGEST_NAME = 50
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the action."""
    parser.add_argument("shards", help="a folder of .tar files, a pattern with * or {000..146}, or an address")
    parser.add_argument(
        "--images", type=integer(1), default=2000, help="images whose headers are read (default: %(default)s)"
    )
    parser.add_argument("--sheet", metavar="FILE.png", help="draw samples before and after augmentation into this file")
    parser.add_argument("--samples", type=integer(1, 200), default=12, help="rows of the sheet (default: %(default)s)")
    parser.add_argument(
        "--copies", type=integer(1, 20), default=3, help="--sheet: augmented copies of each (default: %(default)s)"
    )
    parser.add_argument("--seed", type=integer(0), default=0, help="of both draws (default: %(default)s)")
    add_label_format(parser)
    add_config(parser, required=False)
    parser.set_defaults(run_action=_show)


def _show(arguments: argparse.Namespace) -> None:
    if arguments.sheet is None and (arguments.config or arguments.overrides):
        raise UserError("a config says how images are augmented: give --sheet FILE.png as well")
    if arguments.sheet is not None and Path(arguments.sheet).suffix.lower() != ".png":
        raise UserError(f"--sheet {arguments.sheet}: must be the name of a .png file")
    config = load_config(arguments.config, arguments.overrides)
    index = load_index(arguments.shards, labels=label_format(arguments))
    print(
        f"{len(index):,} images of {len(np.unique(index.label))} classes in {len(index.shards)} "
        f"{'shard' if len(index.shards) == 1 else 'shards'}, {format_bytes(int(index.size.sum()))}"
    )
    if index.faults:
        print(f"{len(index.faults)} samples are left out; `scalevit shards verify` lists them")
    _print_classes(index)
    _print_images(survey(index, images=arguments.images, seed=arguments.seed), len(index))
    if arguments.sheet is not None:
        _draw(config, index, arguments)


def _print_classes(index: Index) -> None:
    labels, counts = np.unique(index.label, return_counts=True)
    table = narrow_table("label", "class", "images", "share", text=("label", "class"))
    shown = labels if len(labels) <= _PRINTED_CLASSES else labels[np.argsort(-counts, kind="stable")]
    half = _PRINTED_CLASSES // 2
    count_of = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    for place, label in enumerate(shown.tolist()):
        if len(labels) <= _PRINTED_CLASSES or place < half or place >= len(labels) - half:
            share = f"{count_of[label] / len(index):.1%}"
            name = index.class_of(label) if index.classes is not None else ""
            shown_name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."
            table.add_row(str(label), shown_name, f"{count_of[label]:,}", share)
        elif place == half:
            table.add_row("...", f"{len(labels) - 2 * half} more", "", "")
    print()
    print_table(table)
    if index.classes is not None and (missing := set(range(len(index.classes))) - set(labels.tolist())):
        names = ", ".join(index.classes[label] for label in sorted(missing)[:10])
        print(f"{len(missing)} named classes have no images: {names}{', ...' if len(missing) > 10 else ''}")


def _print_images(found: Survey, images: int) -> None:
    read = len(found.sizes) + len(found.unreadable)
    print()
    if len(found.sizes):
        of = f"of {read:,} images" if read < images else ""
        table = narrow_table(of, "smallest", "5 %", "median", "95 %", "largest", text=(of,))
        width, height = found.sizes.T
        rows = {
            "width": (width, "{:.0f}"),
            "height": (height, "{:.0f}"),
            "shortest side": (found.sizes.min(1), "{:.0f}"),
            "width / height": (width / height, "{:.2f}"),
            "kB": (found.stored_bytes / 1000, "{:.1f}"),
        }
        for name, (values, form) in rows.items():
            table.add_row(name, *(form.format(value) for value in np.quantile(values, _QUANTILES, method="nearest")))
        print_table(table)
        print()
    print("stored as: " + ", ".join(f"{count:,} {kind}" for kind, count in found.formats.most_common()))
    if found.turned:
        print(f"turned by EXIF: {found.turned:,} (data.exif_orientation)")
    for key, reason in list(found.unreadable.items())[:10]:
        print(f"bad image: {key}: {reason}")
    if (more := len(found.unreadable) - 10) > 0:
        print(f"... and {more} more bad images; `scalevit shards verify` lists all")


def _draw(config: Config, index: Index, arguments: argparse.Namespace) -> None:
    # Imported late: the table needs no torch, which takes seconds to load.
    from scalevit.data.inspection.contact_sheet import contact_sheet, spread_over_classes
    from scalevit.data.loading.dataset import ShardDataset
    from scalevit.training.open_data import (
        device_transform_of,
        evaluation_transform_of,
        normalisation_of,
        training_transform_of,
    )
    from scalevit.training.run import with_model_defaults

    config = with_model_defaults(config)
    # Augmented copies are drawn, no views of the same crop.
    one_view = config.data.augmentation.model_copy(update={"splits": 0, "random_erasing_clean_split": False})
    config = config.model_copy(update={"data": config.data.model_copy(update={"augmentation": one_view})})
    data, (mean, std) = config.data, normalisation_of(config)
    transforms = training_transform_of(config), evaluation_transform_of(config)
    train, evaluation = (
        ShardDataset(index, each, config.seed, exif_orientation=data.exif_orientation) for each in transforms
    )
    samples = spread_over_classes(index, arguments.samples, arguments.seed)
    sheet = contact_sheet(
        train,
        evaluation,
        samples,
        copies=arguments.copies,
        erase=device_transform_of(config, erases=True),
        mean=mean,
        std=std,
    )
    try:
        sheet.save(arguments.sheet)
    except OSError as error:
        raise UserError(f"--sheet {arguments.sheet}: cannot be written ({error.strerror or error})") from None
    print(f"{arguments.sheet}: {len(samples)} samples before and after augmentation ({config.name}, without mixing)")
