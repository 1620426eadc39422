"""Whether a weights file is whole, by its size and by what its form says about its length. Reads no tensor.

Knows the forms of files. Must not know models.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

from scalevit.errors import UserError

_LENGTH = 8
"""Bytes in which a safetensors file says how long its header is."""
_LONGEST = 100_000_000
"""Of a header that safetensors reads; what seems to have a longer one is another kind of file."""


def check_whole(path: Path, source: Any) -> None:
    """Makes sure that a file does not end before its content does, for its own message instead of a library's.

    Args:
        source: of the weights, for messages.

    Raises:
        UserError: it is empty, or a zip file or safetensors file without its end.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH)
        header = int.from_bytes(start, "little")
        is_zip = start.startswith(b"PK\x03\x04")
        if path.suffix == ".safetensors" and not is_zip and header <= _LONGEST:
            is_cut = _LENGTH + header + _bytes_of_tensors(file.read(header)) > size
        else:
            is_cut = is_zip and not zipfile.is_zipfile(path)
    if is_cut or not size:
        raise cut(source)


def cut(source: Any) -> UserError:
    """The error of a file without its end."""
    return UserError(f"weights {source}: is cut or empty: copy or download it again")


def _bytes_of_tensors(header: bytes) -> int:
    """What a safetensors file has after its header; 0 where the header is none."""
    try:
        return max((int(own["data_offsets"][1]) for key, own in json.loads(header).items() if key != "__metadata__"))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return 0
