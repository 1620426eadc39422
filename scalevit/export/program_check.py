"""What a torch program must not contain: `torch.export.load` unpickles what an archive asks it to, and evaluates the
symbols of its graph as Python.

A file passes if it has tensors as plain bytes, and operations on tensors by their names in ATen. The archive is read
by the same (private) reader of torch as there, so that both see the same files.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive._package import PT2ArchiveReader, load_pt2

from scalevit.errors import UserError

_FILES = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|extra/\w+\.json|models/model\.json"
    r"|data/sample_inputs/model\.pt|data/(?:weights/weight|constants/tensor)_\d+"
    r"|data/(?:weights/model_weights|constants/model_constants)_config\.json"
)
_OPERATION = re.compile(r"torch\.ops\.aten\.(?!from_file\.)\w+\.\w+|_operator\.(?:add|sub|mul|floordiv|mod|getitem)")
# Numbers of images, and what is computed of them: Mul(Integer(64), Symbol('s77', positive=True, integer=True)).
_SYMBOL = re.compile(r"Symbol\('s\d+'(?:, [a-z]+=True)*\)")
_FORMULA = re.compile(r"(?:Integer|Add|Mul|FloorDiv|Mod|Max|Min|\d|[-(), ])*")
_TEXT = re.compile(r"[\w,> -]*")
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict"}


class _RefusedError(Exception):
    """What the file has that it must not have."""


def check_program(path: Path, content: bytes) -> None:
    """Makes sure that `torch.export.load` of these bytes executes nothing.

    Args:
        path: of the file, for the message.
        content: the whole file.

    Raises:
        UserError: it is no such archive, or contains more than tensors and operations.
    """
    try:
        _check(content)
    except _RefusedError as error:
        raise UserError(
            f"export {path}: contains more than tensors and operations and was not loaded ({error})"
        ) from None
    except Exception as error:  # of torch's reader and of whatever is not as expected in a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"export {path}: cannot be read ({reason})") from error


def load_checked(content: bytes) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """The program and the extra files of bytes that `check_program` let pass.

    Not by `torch.export.load`, which turns to older, unpickling forms of the file where it cannot read this one.
    """
    loaded = load_pt2(io.BytesIO(content))
    return loaded.exported_programs["model"], loaded.extra_files


def _check(content: bytes) -> None:
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise ValueError("not an archive of torch.export.save")
    reader = PT2ArchiveReader(io.BytesIO(content))
    names = reader.get_file_names()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:  # may find another directory in the same bytes
        seen = sorted(name.partition("/")[2] for name in archive.namelist())
    if seen != sorted(names):
        raise _RefusedError("two directories")
    for name in names:
        if not _FILES.fullmatch(name):
            raise _RefusedError(name)
    for kind in ("weights/model_weights", "constants/model_constants"):
        described = json.loads(reader.read_string(f"data/{kind}_config.json"))["config"]
        for name, entry in described.items():
            if entry["use_pickle"] or not re.fullmatch(r"(?:weight|tensor)_\d+", entry["path_name"]):
                raise _RefusedError(name)
    try:  # torch falls back to the unrestricted unpickler where this fails
        torch.load(io.BytesIO(reader.read_bytes("data/sample_inputs/model.pt")), weights_only=True)
    except Exception:
        raise _RefusedError("data/sample_inputs/model.pt") from None
    _check_graph(json.loads(reader.read_string("models/model.json")))


def _check_graph(program: dict[str, Any]) -> None:
    """Texts that torch looks up, parses or evaluates are harmless."""
    for key, value in _entries(program):
        if key == "target" and not _OPERATION.fullmatch(value):
            raise _RefusedError(value)
        if key == "expr_str" and not _FORMULA.fullmatch(_SYMBOL.sub("0", value)):
            raise _RefusedError(value)
        if key == "as_string" and not _TEXT.fullmatch(value):
            raise _RefusedError(value)
        if key in ("in_spec", "out_spec"):
            for inner, kind in _entries(json.loads(value)):
                if inner == "type" and kind not in _CONTAINERS:
                    raise _RefusedError(kind)
        # Of nodes: where their code came from, which is looked up; and what is evaluated or needs classes of others.
        unwanted = key in ("metadata", "guards_code", "custom_obj_values", "treespec_namedtuple_fields")
        if (unwanted and value) or key in ("as_custom_obj", "as_graph", "as_operator"):
            raise _RefusedError(key)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value in nested JSON."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict):
        yield from value.items()
    for each in inner:
        yield from _entries(each)
