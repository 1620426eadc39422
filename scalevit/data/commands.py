"""`scalevit shards`: the arguments and what they do; `scalevit.cli` mounts them. Must not import torch."""

import argparse

from scalevit.data.shards import DEFAULT_SHARD_SIZE, write_image_folder
from scalevit.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions of `scalevit shards` to its parser."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    write = actions.add_parser("write", help="make shards from a folder with one subfolder of images per class")
    write.add_argument("--source", required=True, help="image folder; its sorted subfolders become the labels 0..")
    write.add_argument("--destination", required=True, help="folder to make; must be missing or empty")
    write.add_argument(
        "--shard-size", type=int, default=DEFAULT_SHARD_SIZE, help="images per shard (default: %(default)s)"
    )
    write.add_argument("--seed", type=int, default=0, help="of the shuffle over the shards (default: %(default)s)")
    write.add_argument("--workers", type=int, default=4, help="processes, 0 for none (default: %(default)s)")
    write.add_argument("--shortest-side", type=int, help="shrink larger images to so many pixels, as JPEG")
    write.add_argument("--quality", type=int, default=90, help="of those JPEGs, 1 to 100 (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Does what the arguments of `add_arguments` say.

    Raises:
        UserError: what the user gave cannot be used.
    """
    for name, lowest in (("shard_size", 1), ("workers", 0), ("shortest_side", 1), ("quality", 1)):
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name.replace('_', '-')} = {value}: must be at least {lowest}")
    if arguments.quality > 100:
        raise UserError(f"--quality = {arguments.quality}: must be at most 100")
    write_image_folder(
        arguments.source,
        arguments.destination,
        shard_size=arguments.shard_size,
        seed=arguments.seed,
        workers=arguments.workers,
        shortest_side=arguments.shortest_side,
        quality=arguments.quality,
    )
