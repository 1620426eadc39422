"""Writes an export, reads it back as another tool does, compares, and only then gives it its name.

Knows exporters by their seam. Must not know any form.
"""

import secrets
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from scalevit.errors import UserError
from scalevit.export.base import Exporter, ModelDescription
from scalevit.files import TEMPORARY_SUFFIX, fsync_path

_BATCHES = (1, 3)
_TOLERANCE = 1e-4
"""Of the logits: absolute where they are below 1, else relative to the largest."""


def publish(exporter: Exporter, model: nn.Module, description: ModelDescription, target: Path, *, tied: bool) -> float:
    """Writes an export, complete or not at all, and what belongs beside it.

    Args:
        model: on the CPU, in evaluation mode.

    Returns:
        The largest difference of a logit between the model and the export, read back.

    Raises:
        UserError: the form cannot hold the model, the export computes something else, or it cannot be written.
    """
    exporter.check_target(target)
    temporary = target.absolute().parent / f".{target.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    try:
        temporary.mkdir()
        written = temporary / target.name
        exporter.write(model, description, written, tied=tied)
        difference = _difference(exporter, model, description, written, target)
        for path in temporary.rglob("*"):
            path.chmod(path.stat().st_mode | (temporary.stat().st_mode & 0o444))  # safetensors' are their owner's only
            fsync_path(path)
        # The target itself last: where it has its name, everything that belongs to it is there.
        for path in sorted(exporter.files(target), key=lambda path: path == target):
            (temporary / path.name).rename(path)
        fsync_path(temporary.parent)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


@torch.no_grad()
def _difference(
    exporter: Exporter, model: nn.Module, description: ModelDescription, written: Path, target: Path
) -> float:
    """The largest difference of a logit, for each number of images.

    Raises:
        UserError: it is larger than rounding explains, or the export cannot be read.
    """
    try:
        logits = exporter.logits(written, model)
    except UserError as error:  # names the temporary file, which is gone when the message is read
        raise UserError(f"{target}: not written: {str(error).replace(str(written), str(target))}") from error
    differences = []
    for images in (_images(count, *description.preprocessing.input_shape) for count in _BATCHES):
        expected, found = model(images), logits(images)
        if found.shape != expected.shape:
            raise UserError(
                f"{target}: not written: its output is {list(found.shape)}, the model's {list(expected.shape)}"
            )
        difference = (found - expected).abs().max().item()
        limit = _TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= limit:
            raise UserError(
                f"{target}: not written: for {len(images)} images its logits differ from the model's by "
                f"{difference:.3g}, more than {limit:.3g}"
            )
        differences.append(difference)
    return max(differences)


def _images(count: int, *shape: int) -> Tensor:
    """The same normal noise at every call: (count, *shape)."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))
