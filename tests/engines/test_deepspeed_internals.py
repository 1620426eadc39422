"""The private names of DeepSpeed that scalevit uses exist in the installed version."""

import importlib
import importlib.resources
import inspect
from typing import Any

import deepspeed

from scalevit.engines.deepspeed import checkpoints, internals
from scalevit.engines.deepspeed.settings import _NATIVE_SETTINGS


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
        for name, value in vars(checkpoints).items()
        if name.isupper() and hasattr(keys, name) and getattr(keys, name) != value
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
