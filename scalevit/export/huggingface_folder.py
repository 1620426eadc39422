"""The folder that timm loads from a model hub or a disk: weights, config.json and a model card.

Must not know how a model is reduced; `timm_model` does.
"""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalevit.errors import UserError
from scalevit.export.base import Exported, Exporter, ModelDescription

if TYPE_CHECKING:
    import torch
    from torch import nn

_CONFIG, _WEIGHTS, _CARD = "config.json", "model.safetensors", "README.md"


class HuggingFaceFolder(Exporter):
    """A folder with model.safetensors, config.json and README.md."""

    name = "huggingface"
    suffix = ""
    purpose = "a folder that timm loads as local-dir:FOLDER, or as hf-hub:NAME once it is uploaded"

    def write(self, model: "nn.Module", description: ModelDescription, target: Path, *, tied: bool) -> None:
        from safetensors.torch import save_file

        from scalevit.export.model_card import model_card
        from scalevit.export.timm_model import as_timm_model, timm_config, untied_state

        call = as_timm_model(model, description)
        config = timm_config(call, description)
        target.mkdir()
        save_file(untied_state(model), target / _WEIGHTS, metadata={"format": "pt"})
        (target / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        (target / _CARD).write_text(model_card(description, call, parameters=parameters), encoding="utf-8")

    def usage(self, target: Path) -> str:
        return f"model = timm.create_model({f'local-dir:{target}'!r}, pretrained=True)"

    def recognises(self, path: Path) -> bool:
        return path.is_dir() and "architecture" in _read_config(path)

    def read(self, path: Path, device: "torch.device") -> Exported:
        import timm

        from scalevit.export.timm_model import exported
        from scalevit.models.weights.plain import why_unreadable

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as for a plain state dict
                model = timm.create_model(f"local-dir:{path}", pretrained=True)
            return exported(model.to(device).eval(), _read_config(path)).checked(device)
        except Exception as error:  # timm limits neither its exceptions nor what it is given
            raise UserError(f"export {path}: cannot be read ({why_unreadable(error)})") from error


def _read_config(folder: Path) -> dict[str, Any]:
    """{} where there is no such file, or it holds something else."""
    try:
        content = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
