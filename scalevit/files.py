"""Files that are whole or not there, whenever a process is killed or a machine loses its power."""

import os
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Replaces a file in one step, when its new content is on the disk.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Puts a file on the disk, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
