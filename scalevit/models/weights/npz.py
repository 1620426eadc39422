"""Weights of Google's JAX programs (big_vision, AugReg): `.npz` archives, which timm reads into a model.

Knows timm's `load_pretrained` of a model. Must not know reductions.
"""

import copy
import math
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scalevit.errors import UserError
from scalevit.models.mlps import transformer_blocks

SUFFIX = ".npz"
_BLOCK = re.compile(r"(?:^|.*/)encoderblock_(\d+)/")
_ALL_BLOCKS = re.compile(r"(?:^|.*/)encoderblock/")


@torch.no_grad()
def read_npz(path: Path, source: Any, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an archive under the names and with the shapes of a model: timm resamples them itself.

    Args:
        source: of the weights, for messages.
        model: unreduced, on any device; it is left as it is.

    Raises:
        UserError: the archive is damaged, of another model, or timm knows no such archives of this model.
    """
    load = getattr(type(model), "load_pretrained", None)
    if load is None:
        raise UserError(f"weights {source}: timm reads no {SUFFIX} file of a {type(model).__name__}")
    _check_depth(path, source, len(transformer_blocks(model)))
    with torch.device("cpu"):
        filled = copy.deepcopy(model).to_empty(device="cpu")
        for tensor in [*filled.parameters(), *filled.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(math.nan)  # finds what timm does not take from the archive
        try:
            load(filled, str(path))
        except Exception as error:  # timm checks little of what it reads
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"weights {source}: timm cannot read it for this model ({reason})") from error
    state = filled.state_dict()
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isnan().all()}


def _check_depth(path: Path, source: Any, depth: int) -> None:
    """timm would take the first blocks of a deeper model without a word."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            numbered = {int(match[1]) for name in archive.files if (match := _BLOCK.match(name))}
            stacked = [name for name in archive.files if _ALL_BLOCKS.match(name)]
            found = len(archive[stacked[0]]) if stacked else len(numbered)
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"weights {source}: cannot be read ({reason})") from error
    if found != depth:
        raise UserError(f"weights {source}: has {found} blocks, and this model {depth}")
