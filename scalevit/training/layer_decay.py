"""The learning rate of parameters that several layers share, where it decays from layer to layer.

timm's groups know a parameter by the first of its names. Knows timm's layers; must not know engines.
"""

from collections.abc import Callable, Iterable
from functools import partial
from statistics import mean
from types import SimpleNamespace
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn

from scalevit.config.training import OptimizerConfig
from scalevit.errors import SettingError
from scalevit.tying import tied_names

_CHOICES: dict[str, Callable[[Iterable[float]], float]] = {"first": min, "mean": mean, "last": max}


def move_shared_parameters(optimizer: torch.optim.Optimizer, module: nn.Module, config: OptimizerConfig) -> None:
    """Gives shared parameters the `lr_scale` that `layer_decay_shared` names, in groups of an optimizer without state.

    Args:
        optimizer: of timm, built with `layer_decay`.
        module: whose parameters it has.

    Raises:
        SettingError: timm knows no layers of a model with shared parameters.
    """
    names: dict[str, list[str]] = {}
    for name, first in tied_names(module).items():
        names.setdefault(first, [first]).append(name)
    scales = layer_scales(module, config) if names else {}
    parameters = dict(module.named_parameters())
    for first, all_names in names.items():
        parameter = parameters[first]
        if parameter.requires_grad:
            wanted = _CHOICES[config.layer_decay_shared](scales[name] for name in all_names)
            _move(optimizer, parameter, wanted)


def freeze_slow_layers(module: nn.Module, config: OptimizerConfig) -> None:
    """Marks parameters that are not trained because their layer's factor is below `layer_decay_no_opt_scale`, in place.

    As timm's groups do, but before an engine is built, and of a shared parameter by the factor that it gets.

    Raises:
        SettingError: timm knows no layers of this model.
    """
    if config.layer_decay is None or config.layer_decay_no_opt_scale is None:
        return
    scales, names = layer_scales(module, config), tied_names(module)
    uses: dict[str, list[float]] = {}
    for name, scale in scales.items():
        uses.setdefault(names.get(name, name), []).append(scale)
    for name, parameter in module.named_parameters():
        if _CHOICES[config.layer_decay_shared](uses[name]) < config.layer_decay_no_opt_scale:
            parameter.requires_grad_(False)


def layer_scales(module: Any, config: OptimizerConfig) -> dict[str, float]:
    """By every name of a parameter, the factor on the learning rate of the layer that the name is in, as timm has it.

    Raises:
        SettingError: timm knows no layers of this model.
    """
    if not hasattr(module, "group_matcher"):
        raise SettingError("layer_decay", config.layer_decay, "timm knows no layers of this model")
    assert config.layer_decay is not None, "checked by the caller"
    matcher = module.group_matcher(coarse=False)
    # timm asks a module for its parameters, which leaves out further names.
    every_name: Any = SimpleNamespace(named_parameters=partial(module.named_parameters, remove_duplicate=False))
    layers = group_parameters(every_name, matcher, reverse=True)
    last = max(layers.values())
    return {
        name: max(config.layer_decay_min_scale, config.layer_decay ** (last - layer)) for name, layer in layers.items()
    }


def _move(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, scale: float) -> None:
    (old,) = (group for group in optimizer.param_groups if any(own is parameter for own in group["params"]))
    if old["lr_scale"] == scale:
        return
    wanted = {**old, "lr_scale": scale, "params": [parameter]}
    old["params"] = [own for own in old["params"] if own is not parameter]
    for group in optimizer.param_groups:
        if all(group[key] == value for key, value in wanted.items() if key != "params"):
            group["params"].append(parameter)
            break
    else:
        optimizer.add_param_group(wanted)
    if not old["params"]:
        optimizer.param_groups.remove(old)
