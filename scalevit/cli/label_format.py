"""Arguments for how labels are written in shards, shared by the actions of `scalevit shards`."""

import argparse

from scalevit.data.shards.labels import DEFAULT_KEY, LabelFormat
from scalevit.data.writing.sources.classes import read_class_names


def add_label_format(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `label_format` reads."""
    parser.add_argument(
        "--label-key", default=DEFAULT_KEY, help="key of the label in .json members (default: %(default)s)"
    )
    parser.add_argument(
        "--class-names", metavar="FILE", help="names of labels 0, 1, ..., which may be written as names"
    )


def label_format(arguments: argparse.Namespace) -> LabelFormat:
    """How labels are written, by the arguments.

    Raises:
        UserError: the file of class names cannot be read.
    """
    names = None if arguments.class_names is None else tuple(read_class_names(arguments.class_names))
    return LabelFormat(arguments.label_key or DEFAULT_KEY, names)
