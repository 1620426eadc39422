"""Which shards a path, pattern or address names. Knows files and addresses; must not open shards."""

import glob
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from scalevit.data.storage.files import read_if_present, size_and_time
from scalevit.data.storage.paths import StreamOnlyError, expand_braces, file_name, has_wildcard, is_pipe, is_remote
from scalevit.data.storage.remote import list_files
from scalevit.errors import UserError

SET_FILE = "set.json"
"""Written last by our writer: names the shards of the set."""


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
    """The tar files of a folder, of a glob, or of `{000..146}` braces.

    Args:
        pattern: a local path, or an address that fsspec supports.

    Raises:
        StreamOnlyError: a `pipe:` command.
        UserError: no shards found, one of the braces' is missing, or a folder differs from its `set.json`.
    """
    text = os.fspath(pattern)
    if is_pipe(text):
        raise StreamOnlyError(f"shards at {text}: the output of a command can only be streamed")
    return _find_at_address(text) if is_remote(text) else _find_local(text)


def class_names(shards: Sequence[str]) -> tuple[str, ...] | None:
    """The names of labels 0... from the `set.json` beside shards; None if there is none, or it names no classes.

    Args:
        shards: paths or addresses, as `find_shards` returns them.

    Raises:
        UserError: a `set.json` is damaged, or the shards are of folders whose classes differ.
    """
    files_of: dict[str, list[str]] = {}
    for path in shards:
        files_of.setdefault(os.path.dirname(path), []).append(file_name(path))
    names_of = {folder: _names_in(folder, files) for folder, files in files_of.items()}
    folder_of = {names: folder for folder, names in names_of.items() if names is not None}
    if len(folder_of) > 1:
        raise UserError(
            f"shards at {' and '.join(list(folder_of.values())[:2])}: their classes differ, so that a label would mean "
            "two things; write both again with the same classes"
        )
    return None if None in names_of.values() else next(iter(folder_of))


def _names_in(folder: str, files: Sequence[str]) -> tuple[str, ...] | None:
    path = os.path.join(folder, SET_FILE)
    content = read_if_present(path)
    if content is None:
        return None
    try:
        about = json.loads(content)
        names = about.get("classes")
        if not set(files) <= set(about["shards"]) or names is None:
            return None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _damaged(path) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise _damaged(path)
    return tuple(names)


def _damaged(path: str) -> UserError:
    return UserError(f"{path}: is damaged; remove it to use the shards without it")


def stat_shard(path: str) -> Shard:
    """Size and time of a shard.

    Raises:
        UserError: it cannot be read.
    """
    return Shard(path, *size_and_time(path))


def _find_local(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        found = sorted(filter(os.path.isfile, glob.glob(os.path.join(glob.escape(pattern), "*.tar"))))
        folder = pattern.rstrip("/")
        content = read_if_present(f"{folder}/{SET_FILE}")
        if content is not None:
            _check_complete(folder, _set_names(folder, content), found)
    else:
        names = expand_braces(pattern)
        found = [path for name in names for path in (sorted(glob.glob(name)) if has_wildcard(name) else [name])]
        missing = [path for path in found if not os.path.isfile(path)]
        if len(names) > 1 and missing and len(missing) < len(found):
            raise UserError(f"shards at {pattern}: {len(missing)} of {len(found)} are missing, first {missing[0]}")
        found = [] if missing else found
        folder = os.path.dirname(pattern) if pattern.endswith(".tar") or has_wildcard(pattern) else pattern
    if not found:
        inside = sorted({os.path.dirname(path) for path in glob.glob(os.path.join(glob.escape(pattern), "*", "*.tar"))})
        if inside:
            raise UserError(f"no shards at {pattern}, but in {', '.join(inside)}: name one of them")
        if os.path.isdir(pattern) and any(entry.is_dir() for entry in os.scandir(pattern)):
            raise UserError(
                f"no shards at {pattern}, a folder of folders: if they have images, create shards with "
                f"`scalevit shards write --source {pattern} --destination SHARDS`, and name SHARDS"
            )
        raise UserError(
            f"no shards at {pattern}: create them with `scalevit shards write --source IMAGES --destination {folder}`"
        )
    return found


def _find_at_address(pattern: str) -> list[str]:
    """A folder with a `set.json` is read without listing it if the server cannot list."""
    if has_wildcard(pattern) or "{" in pattern or pattern.endswith(".tar"):
        found = []
        for name in expand_braces(pattern):
            found += (list_files(name) or []) if has_wildcard(name) else [name]
    else:
        folder = pattern.rstrip("/")
        content = read_if_present(f"{folder}/{SET_FILE}")
        names = None if content is None else _set_names(folder, content)
        listed = list_files(f"{folder}/*.tar")
        if names is not None and listed is not None:
            _check_complete(folder, names, listed)
        found = listed or [f"{folder}/{name}" for name in names or ()]
    if not found:
        raise UserError(f"no shards at {pattern}: name a folder of .tar files, a glob, or {{000..146}} braces")
    return found


def _set_names(folder: str, content: bytes) -> list[str]:
    """The names of the shards in the content of a folder's `set.json`.

    Raises:
        UserError: it is damaged.
    """
    try:
        return [str(name) for name in json.loads(content)["shards"]]
    except (ValueError, KeyError, TypeError):
        raise _damaged(f"{folder}/{SET_FILE}") from None


def _check_complete(folder: str, names: list[str], found: list[str]) -> None:
    """Compares the shards of a folder with the names in its `set.json`.

    Raises:
        UserError: one is missing, or one is not part of the set.
    """
    present = {file_name(path) for path in found}
    if missing := sorted(set(names) - present):
        raise UserError(f"shards at {folder}: {len(missing)} of {len(set(names))} are missing, first {missing[0]}")
    if foreign := sorted(present - set(names)):
        raise UserError(
            f"shards at {folder}: {foreign[0]} is not part of the set that {folder}/{SET_FILE} names; move it away"
        )
