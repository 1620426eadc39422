"""Writes weights files: each tensor once under its canonical name, with the other names of shared tensors.

A shared MLP is in a plain `state_dict` once per block that uses it (152 keys for 128 parameters in a grouped ViT-B/16),
which safetensors refuses.
"""

import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from scalevit.config.model import WEIGHTS_SETTINGS, ModelConfig
from scalevit.errors import UserError
from scalevit.files import writing_whole
from scalevit.models.reductions.base import Reduction
from scalevit.models.weights.description import METADATA_KEY


def write_weights(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    model: ModelConfig,
    reduction: Reduction,
    tied: Mapping[str, str],
    classes: Sequence[str] | None = None,
) -> None:
    """Writes one safetensors file, flushed to disk: complete or not at all.

    Args:
        tensors: by canonical name, on the CPU.
        tied: further name -> canonical name.
        classes: names of the classifier's outputs, if they are known.

    Raises:
        UserError: the file cannot be written.
    """
    description = {
        "model": model.model_dump(mode="json", exclude=WEIGHTS_SETTINGS),
        "reduction": reduction.model_dump(mode="json"),
        "tied": dict(tied),
        "classes": None if classes is None else list(classes),
    }
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        with writing_whole(path) as temporary:
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            save_file(contiguous, temporary, metadata={"format": "pt", METADATA_KEY: json.dumps(description)})
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
