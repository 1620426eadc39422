"""The private names of DeepSpeed that scalevit uses exist in the installed version, and are in one file."""

import ast
import importlib
import importlib.resources
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed

import scalevit
from scalevit.engines.deepspeed import file_keys, internals
from scalevit.engines.deepspeed.settings import _NATIVE_SETTINGS

PACKAGE = Path(scalevit.__file__).parent
HOMES = {Path(module.__file__ or "") for module in (internals, file_keys)}
FILE_KEYS = {name: value for name, value in vars(file_keys).items() if name.isupper()}


def find(path: str) -> Any:
    """The class or module of a dotted name."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


def exists(path: str, name: str) -> bool:
    """Whether a class or module has the name, or its source mentions it: attributes are set when objects are made."""
    try:
        owner = find(path)
    except (ModuleNotFoundError, AttributeError):
        return False
    return hasattr(owner, name) or name in inspect.get_annotations(owner) or f".{name}" in inspect.getsource(owner)


def test_every_private_name_is_there() -> None:
    gone = [
        f"{path}.{name}: scalevit needs it to {purpose}"
        for (path, name), purpose in internals.PRIVATE_NAMES.items()
        if not exists(path, name)
    ]
    keys = importlib.import_module("deepspeed.checkpoint.constants")
    gone += [
        f"deepspeed.checkpoint.constants.{name} is no longer {value!r}: scalevit reads checkpoints with it"
        for name, value in FILE_KEYS.items()
        if getattr(keys, name, None) != value
    ]
    package = importlib.resources.files(deepspeed)
    sources = "".join(
        (package / file).read_text()
        for file in (
            "runtime/config.py",
            "runtime/constants.py",
            "runtime/swap_tensor/constants.py",
            "runtime/zero/config.py",
            "profiling/constants.py",
            "comm/constants.py",
            "monitor/config.py",
            "utils/config.py",
        )
    )
    gone += [
        f"engine setting {name!r}: DeepSpeed no longer reads it, remove it from _NATIVE_SETTINGS"
        for name in _NATIVE_SETTINGS
        if f'"{name}"' not in sources and f"'{name}'" not in sources
    ]
    assert not gone, f"DeepSpeed {deepspeed.__version__} lacks:\n" + "\n".join(gone)


def test_a_name_that_is_gone_is_found() -> None:
    path = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
    assert exists(path, "fp32_partitioned_groups_flat")
    assert not exists(path, "fp32_partitioned_groups_flatter")
    assert not exists("deepspeed.runtime.zero.stage4.Optimizer", "step")


def mentions(source: str) -> Iterator[tuple[int, str]]:
    """Lines of a module with a private name or a file key of DeepSpeed, as attribute or as text, and the name."""
    private = {name for _, name in internals.PRIVATE_NAMES} | set(FILE_KEYS.values())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in private:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and node.value in private:
            yield node.lineno, node.value


def test_private_names_are_in_no_other_file() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file not in HOMES]
    assert len(files) > 100
    found = [
        f"{file.relative_to(PACKAGE)}:{line}: {name} belongs into engines/deepspeed/internals.py"
        for file in files
        for line, name in mentions(file.read_text())
    ]
    assert not found, "\n".join(found)


def test_a_private_name_elsewhere_is_found() -> None:
    source = "local = parameter.ds_tensor.data\nkey = 'param_shapes'\nshape = getattr(parameter, 'ds_shape')\n"
    assert sorted(mentions(source)) == [(1, "ds_tensor"), (2, "param_shapes"), (3, "ds_shape")]
    assert not list(mentions("ds_tensor = parameter.ds_id  # ds_tensor\n"))
