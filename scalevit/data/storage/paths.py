"""Names of files: local paths, addresses (`s3://...`) and commands (`pipe:...`). Knows strings only; opens nothing."""

import glob

from braceexpand import braceexpand

from scalevit.errors import UserError


class StreamOnlyError(UserError):
    """Shards that can only be read from beginning to end: the output of a command, a server without byte ranges."""


def is_remote(path: str) -> bool:
    """Whether it is an address (s3://, gs://, http://, memory://, ...) and not a local path."""
    return "://" in path


def is_pipe(path: str) -> bool:
    """Whether it is a command whose output is a tar, as webdataset writes it."""
    return path.startswith("pipe:")


def has_wildcard(path: str) -> bool:
    """Whether it is a glob pattern."""
    return glob.has_magic(path)


def file_name(path: str) -> str:
    """The part after the last slash."""
    return path.rpartition("/")[2]


def beside(path: str, extension: str) -> str:
    """The file that belongs to a shard: its name with another extension.

    Args:
        path: of the shard, ends with ".tar".
        extension: with its dot.
    """
    return path.rpartition(".tar")[0] + extension


def expand_braces(text: str) -> list[str]:
    """`a{1..2}` to a1 and a2.

    Raises:
        UserError: the braces do not match.
    """
    try:
        return list(braceexpand(text))
    except ValueError:
        raise UserError(f"shards at {text}: the braces do not match") from None
