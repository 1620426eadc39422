"""Tensor slices to and from safetensors files. Knows slices and files.

Each rank writes one file. Its header says which range of which (flattened) tensor each entry is, under the key and in
the form of torch.distributed.checkpoint: torch's `HuggingFaceStorageReader` reads the files too, and so does the
safetensors package. There is no metadata file, because torch's is a pickle, which can run code when it is read.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scalevit.engines.state import TensorSlice
from scalevit.errors import UserError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_OFFSETS = "DCP_SHARDING_INFO"


def file_of(rank: int) -> str:
    """The name of a rank's file, as torch's own writer would choose it."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def write_slices(folder: Path, slices: Mapping[str, TensorSlice], *, rank: int) -> None:
    """Writes this rank's file, `file_of(rank)`, and flushes it to disk; none if it has no elements. Not collective.

    Args:
        slices: by tensor name, on the CPU; those of all ranks together hold each element once.

    Raises:
        OSError: the file cannot be written.
    """
    # Large types first: every tensor is then aligned to its type.
    held = sorted(
        ((name, part) for name, part in slices.items() if part.values.numel()),
        key=lambda item: -item[1].values.element_size(),
    )
    if not held:
        return
    with open(folder / file_of(rank), "wb") as file:
        file.write(_header(dict(held)))
        for _, part in held:
            file.write(part.values.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _header(slices: Mapping[str, TensorSlice]) -> bytes:
    """The length of the header, and what is where."""
    offsets = {name: {"saved_offsets": [part.start]} for name, part in slices.items()}
    entries: dict[str, Any] = {
        "__metadata__": {"format": "pt", "DCP_VERSION": "1.0", _OFFSETS: json.dumps(offsets)},
    }
    end = 0
    for name, part in slices.items():
        begin, end = end, end + part.values.nbytes
        entries[name] = {
            "dtype": _DTYPES[part.values.dtype],
            "shape": [part.values.numel()],
            "data_offsets": [begin, end],
        }
    content = json.dumps(entries).encode()
    content += b" " * (-len(content) % 8)  # aligned, as safetensors writes it
    return struct.pack("<Q", len(content)) + content


def read_slices(folder: Path, slices: Mapping[str, TensorSlice]) -> None:
    """Fills slices, however they are cut, from the files of a folder. Not collective: each rank reads what it needs.

    Raises:
        UserError: a file cannot be read, or the files do not hold all elements of a slice.
    """
    missing = {name: part.values.numel() for name, part in slices.items()}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                offsets = json.loads(file.metadata()[_OFFSETS])
                for name in missing.keys() & offsets.keys():
                    (start,) = offsets[name]["saved_offsets"]
                    missing[name] -= _fill(slices[name], file.get_slice(name), start)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"checkpoint {folder}: cannot be read ({reason})") from None
    for name, number in missing.items():
        if number:
            raise UserError(f"checkpoint {folder}: cannot be read ({name} is not complete)")


def _fill(part: TensorSlice, stored: Any, start: int) -> int:
    """Copies what a slice has in common with a stored range that begins at `start`; returns how many elements."""
    (numel,) = stored.get_shape()
    begin, end = max(part.start, start), min(part.start + part.values.numel(), start + numel)
    if begin >= end:
        return 0
    values: Tensor = stored[begin - start : end - start]
    part.values[begin - part.start : end - part.start].copy_(values)
    return end - begin
