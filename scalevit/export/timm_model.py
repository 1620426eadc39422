"""A reduced model as plain timm builds it: the arguments of its factory, its state dict and its config.

timm knows no reductions. It builds a narrowed model with another `mlp_ratio`, and a grouped one with an MLP per block,
which then hold equal weights. Knows timm and modules, not files.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from scalevit.errors import UserError
from scalevit.export.base import Exported, ModelDescription, Preprocessing
from scalevit.models.build import create_timm_model, timm_arguments
from scalevit.models.mlps import mlp_views
from scalevit.models.reductions.base import fraction_of
from scalevit.tying import tied_names

# What timm's config says about its own pretrained weights, which these are not.
_OF_TIMMS_WEIGHTS = ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes", "description")


class TimmModel(NamedTuple):
    """A call of `timm.create_model`."""

    architecture: str
    arguments: dict[str, Any]


def as_timm_model(model: nn.Module, description: ModelDescription) -> TimmModel:
    """The call that builds a model with the same names and shapes.

    Raises:
        UserError: there is none.
    """
    architecture = description.model.name.partition(".")[0]
    wanted = _shapes(model)
    with torch.device("meta"):
        built, arguments = create_timm_model(architecture, timm_arguments(description.model, description.reduction))
    arguments.pop("drop_path_rate", None)  # a setting of training
    first = _shapes(built)
    if first == wanted:
        return TimmModel(architecture, arguments)
    for ratio in _mlp_ratios(model):
        narrowed = {**arguments, "mlp_ratio": ratio}
        if _built_shapes(architecture, narrowed) == wanted:
            return TimmModel(architecture, narrowed)
    name = next(name for name in sorted(wanted.keys() | first.keys()) if wanted.get(name) != first.get(name))
    here, there = (list(shapes[name]) if name in shapes else "missing" for shapes in (wanted, first))
    raise UserError(
        f"model {architecture}: timm cannot build it as it was reduced, with any mlp_ratio ({name} is {here}, timm's "
        f"is {there}); export it in another form"
    )


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of all tensors, under each of their names."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _built_shapes(architecture: str, arguments: Mapping[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return _shapes(timm.create_model(architecture, **arguments))


def _mlp_ratios(model: nn.Module) -> Iterator[float]:
    """What `mlp_ratio` may have to be for timm to build an MLP as the first one."""
    view = next((view for views in mlp_views(model) for view in views), None)
    if view is not None:
        yield fraction_of(view.hidden, view.width)
        yield fraction_of(2 * view.hidden, view.width)  # a packed gated MLP counts gate and value


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with a copy of each shared tensor under each of its names, as timm's strict loading needs it."""
    tied = tied_names(model)
    return {
        name: tensor.clone() if name in tied else tensor.contiguous() for name, tensor in model.state_dict().items()
    }


def tied_modules(model: nn.Module) -> dict[str, str]:
    """The name of the module that another one is, by that one's name: {"blocks.1.mlp": "blocks.0.mlp"}."""
    first: dict[nn.Module, str] = {}
    tied: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        canonical = first.setdefault(module, name)
        if canonical != name and not any(name.startswith(f"{outer}.") for outer in tied):
            tied[name] = canonical
    return tied


def tie_modules(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Makes modules share their parameters, in place.

    Args:
        tied: as `tied_modules` returns it.
    """
    for name, canonical in tied.items():
        model.set_submodule(name, model.get_submodule(canonical))


def timm_config(call: TimmModel, description: ModelDescription) -> dict[str, Any]:
    """The content of config.json as timm writes it to a model hub: how the model is built, and images are prepared."""
    preparation = description.preprocessing
    with torch.device("meta"):
        built: Any = timm.create_model(call.architecture, **call.arguments)
    data_config = {
        "input_size": preparation.input_shape,
        "interpolation": preparation.interpolation,
        "crop_pct": preparation.crop_pct,
        "crop_mode": preparation.crop_mode,
        "mean": preparation.mean,
        "std": preparation.std,
    }
    names = {} if description.label_names is None else {"label_names": description.label_names}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config_for_hf(built, str(path), model_config=names, model_args=call.arguments, data_config=data_config)
        config = json.loads(path.read_text())
    for key in _OF_TIMMS_WEIGHTS:
        config["pretrained_cfg"].pop(key, None)
    return config


def exported(model: nn.Module, config: Mapping[str, Any]) -> Exported:
    """A model that timm built from such a config.

    Raises:
        KeyError, TypeError, ValueError: the config lacks something.
    """
    own = config["pretrained_cfg"]
    channels, *sides = own["input_size"]
    if channels != len(own["mean"]) or len(set(sides)) != 1:
        raise ValueError(f"input_size = {own['input_size']}: only square RGB or grey images are supported")
    if own.get("crop_mode", "center") != "center":
        raise ValueError(f"crop_mode = {own['crop_mode']!r}: only center is supported")
    preparation = Preprocessing.from_json({**own, "image_size": own["input_size"][-1]})
    return Exported(model, preparation, int(config["num_classes"]), _label_names(config))


def _label_names(config: Mapping[str, Any]) -> list[str] | None:
    """By class; timm writes a list, or an object whose keys are the numbers of the classes."""
    names = config.get("label_names")
    if isinstance(names, dict):  # which may have gaps
        count = max(int(config["num_classes"]), 1 + max(map(int, names), default=0))
        names = [names.get(str(number), str(number)) for number in range(count)]
    return None if names is None else [str(name) for name in names]


def create_call(source: str, arguments: Mapping[str, Any]) -> str:
    """A call of timm's factory as a line of Python."""
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f"timm.create_model({source!r}{given})"
