"""Weights that plain timm loads: a safetensors file, and beside it a JSON file that says how to build the model.

Tensors that blocks share are in the file under each of their names, as timm's strict loading needs it, or once
(`--tied`).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalevit.errors import UserError
from scalevit.export.base import Exported, Exporter, ModelDescription

if TYPE_CHECKING:
    import torch
    from torch import nn

TIED_KEY = "tied_modules"
"""Of the JSON file of tied weights: name of a module -> name of the module that it is."""


class TimmWeights(Exporter):
    """NAME.safetensors and NAME.json."""

    name = "timm"
    suffix = ".safetensors"
    purpose = "weights that plain timm loads, with NAME.json beside NAME.safetensors"
    can_tie = True

    def write(self, model: "nn.Module", description: ModelDescription, target: Path, *, tied: bool) -> None:
        from safetensors.torch import save_file

        from scalevit.export.timm_model import as_timm_model, tied_modules, timm_config, untied_state
        from scalevit.tying import canonical_state

        config = timm_config(as_timm_model(model, description), description)
        if tied:
            config[TIED_KEY] = tied_modules(model)
        state = canonical_state(model) if tied else untied_state(model)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, target, metadata={"format": "pt"})
        _config_file(target).write_text(json.dumps(config, indent=2) + "\n")

    def files(self, target: Path) -> list[Path]:
        return [_config_file(target), target]

    def usage(self, target: Path) -> str:
        from scalevit.export.timm_model import create_call

        config = _read_config(target)
        arguments = config["model_args"]
        if TIED_KEY not in config:
            return f"model = {create_call(config['architecture'], {**arguments, 'checkpoint_path': str(target)})}"
        return "\n".join(
            [
                f"model = {create_call(config['architecture'], arguments)}",
                f"for name, shared in {config[TIED_KEY]}.items():",
                "    model.set_submodule(name, model.get_submodule(shared))",
                f"safetensors.torch.load_model(model, {str(target)!r})",
            ]
        )

    def recognises(self, path: Path) -> bool:
        return path.suffix == self.suffix and _config_file(path).is_file() and "architecture" in _read_config(path)

    def read(self, path: Path, device: "torch.device") -> Exported:
        import timm
        from safetensors.torch import load_model

        from scalevit.export.timm_model import exported, tie_modules

        config = _read_config(path)
        try:
            arguments, tied = config["model_args"], config.get(TIED_KEY)
            if tied is None:
                model = timm.create_model(config["architecture"], checkpoint_path=str(path), **arguments)
            else:
                model = timm.create_model(config["architecture"], **arguments)
                tie_modules(model, tied)
                load_model(model, path)
            return exported(model.to(device).eval(), config).checked(device)
        except Exception as error:  # timm and safetensors limit neither their exceptions nor what they are given
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"export {path}: cannot be read ({reason})") from error


def _config_file(weights: Path) -> Path:
    return weights.with_suffix(".json")


def _read_config(weights: Path) -> dict[str, Any]:
    """{} where the file holds something else."""
    try:
        content = json.loads(_config_file(weights).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
