"""Which shards a path, pattern or address names. Knows files and addresses; must not open shards."""

import glob
import json
import os
from dataclasses import dataclass

from braceexpand import braceexpand

from scalevit.data.storage.files import is_remote
from scalevit.errors import UserError

# Written last by our writer: names the shards of the set.
SET_FILE = "set.json"


@dataclass(frozen=True)
class Shard:
    """A tar file as it was when it was indexed."""

    path: str
    """Or address."""
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970; 0 for an address."""


def find_shards(pattern: str | os.PathLike[str]) -> list[str]:
    """The tar files of a folder, of a glob, or of `{000..146}` braces, each of which must exist.

    Args:
        pattern: a path of this machine, or an address that fsspec knows.

    Raises:
        UserError: none there, one of the braces' missing, or one missing that the folder's `set.json` names.
    """
    text = os.fspath(pattern)
    if text.startswith("pipe:"):
        raise UserError(
            f"shards at {text}: a pipe cannot be read at any place; set data.stream_samples_per_epoch to stream it"
        )
    if is_remote(text):
        from scalevit.data.storage.remote import find_remote_shards

        return find_remote_shards(text)
    if os.path.isdir(text):
        found = sorted(filter(os.path.isfile, glob.glob(os.path.join(glob.escape(text), "*.tar"))))
        folder = text.rstrip("/")
        _check_complete(folder, found)
    else:
        names = expand_braces(text)
        found = [path for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
        missing = [path for path in found if not os.path.isfile(path)]
        if len(names) > 1 and missing and len(missing) < len(found):
            raise UserError(f"shards at {text}: {len(missing)} of {len(found)} are missing, first {missing[0]}")
        found = [] if missing else found
        folder = os.path.dirname(text) if text.endswith(".tar") or glob.has_magic(text) else text
    if not found:
        raise UserError(
            f"no shards at {text}: make them with `scalevit shards write --source IMAGES --destination {folder}`"
        )
    return found


def expand_braces(text: str) -> list[str]:
    """`a{1..2}` to a1 and a2.

    Raises:
        UserError: the braces do not match.
    """
    try:
        return list(braceexpand(text))
    except ValueError:
        raise UserError(f"shards at {text}: the braces do not match") from None


def stat_shard(path: str) -> Shard:
    """Size and time of a shard.

    Raises:
        UserError: it cannot be read.
    """
    if is_remote(path):
        from scalevit.data.storage.remote import size_of

        return Shard(path, size_of(path), 0)
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"shard {path}: cannot be read ({error.strerror})") from None
    return Shard(path, status.st_size, status.st_mtime_ns)


def check_names(folder: str, description: bytes, found: list[str]) -> None:
    """Compares the shards of a folder with its `set.json`.

    Raises:
        UserError: one is missing, one is not part of the set, or the file is damaged.
    """
    where = f"{folder}/{SET_FILE}"
    try:
        names = {str(name) for name in json.loads(description)["shards"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: is damaged; remove it to take the folder's shards as they are") from None
    present = {path.rpartition("/")[2] for path in found}
    if missing := sorted(names - present):
        raise UserError(f"shards at {folder}: {len(missing)} of {len(names)} are missing, first {missing[0]}")
    if foreign := sorted(present - names):
        raise UserError(f"shards at {folder}: {foreign[0]} is not part of the set that {where} names; move it away")


def _check_complete(folder: str, found: list[str]) -> None:
    try:
        with open(os.path.join(folder, SET_FILE), "rb") as file:
            description = file.read()
    except FileNotFoundError:
        return  # not from our writer
    except OSError as error:
        raise UserError(f"{folder}/{SET_FILE}: cannot be read ({error.strerror})") from None
    check_names(folder, description, found)
