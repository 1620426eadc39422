"""The environment record: versions, machine and command, as every result of this project has it beside it.

The one such record of the library; only the kernels keep a smaller one, because they run without the rest. Must not
import torch: the caller names the device.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scalevit import __version__

PACKAGES = (
    "scalevit",
    "torch",
    "torchvision",
    "triton",
    "timm",
    "deepspeed",
    "webdataset",
    "wandb",
    "numpy",
    "pillow",
    "simplejpeg",
)


def describe_environment(world_size: int, device: str) -> dict[str, Any]:
    """What a reader needs to judge or repeat a result.

    Args:
        world_size: number of ranks.
        device: name of the device that one rank computes on.
    """
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": package_versions(),
        "git_commit": git_commit(),
        "host": platform.node(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "device": device,
        "world_size": world_size,
    }


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """The installed version of each package; None where it is not installed."""
    return {name: _version(name) for name in packages}


def git_commit() -> str | None:
    """The commit that this file belongs to, with a "+" if files differ from it; None outside a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails where this is an installed copy inside another checkout
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    if package == "scalevit":
        return __version__  # also of a checkout that is not installed
    try:
        return version(package)
    except PackageNotFoundError:
        return None
