"""Reads and writes what a torch optimizer keeps, for engines: tensors, scalars, and counters in parameter groups.

Knows `torch.optim.Optimizer` and no particular optimizer.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from scalevit.engines.state import OptimizerState, Scalar

Group = dict[str, Any]


def kept_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What an optimizer keeps as tensors with dimensions for one parameter (or flat buffer), by name."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim}


def kept_scalars(state: Mapping[str, Any]) -> dict[str, Scalar]:
    """What it keeps as numbers or as tensors without dimensions; the latter as copies on the CPU.

    Raises:
        TypeError: it keeps something else, which no checkpoint could hold.
    """
    scalars: dict[str, Scalar] = {}
    for key, value in state.items():
        if isinstance(value, bool | int | float):
            scalars[key] = value
        elif isinstance(value, Tensor):
            if not value.ndim:
                scalars[key] = value.detach().to("cpu", copy=True)
        elif value is not None:
            raise TypeError(f"{key} is a {type(value).__name__}")
    return scalars


def group_scalars(group: Group, settings: Collection[str]) -> dict[str, Scalar]:
    """The numbers, or tensors without dimensions, that an optimizer has added to a parameter group; copies.

    Args:
        settings: the keys of the group before the first step.

    Raises:
        TypeError: it has added something else, which no checkpoint could hold.
    """
    added = {key: value for key, value in group.items() if key not in settings and value is not None}
    scalars = kept_scalars(added)
    for key in added.keys() - scalars.keys():
        raise TypeError(f"{key} of a parameter group is a {type(added[key]).__name__}")
    return scalars


def placed_scalar(key: str, value: Scalar, group: Group, device: torch.device) -> Scalar:
    """A scalar as the optimizer wants it back: a copy, where torch.optim.Optimizer.load_state_dict would put it."""
    if not isinstance(value, Tensor):
        return value
    if key == "step" and not group.get("fused") and not group.get("capturable"):
        return value.clone()
    return value.to(device, copy=True)


class GroupCounters:
    """Numbers that an optimizer adds to its parameter groups while it steps: Adan and LAMB count their steps there."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        """To be called before the first step: whatever number is in a group by then is a setting."""
        self._settings = [frozenset(group) for group in optimizer.param_groups]

    def of(self, number: int, group: Group) -> dict[str, Scalar]:
        """The counters of a group, by name.

        Args:
            number: index of the group in the optimizer.
        """
        return group_scalars(group, self._settings[number])

    def replace(self, number: int, group: Group, counters: Mapping[str, Scalar]) -> None:
        """Sets the counters of a group to copies; those that are not named are removed."""
        for key in self.of(number, group):
            del group[key]
        group.update({key: value.clone() if isinstance(value, Tensor) else value for key, value in counters.items()})


class ScalarCollector:
    """Collects scalars by name and parameter, as `OptimizerState.scalars` has them."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[str, Scalar]] = {}

    def add(self, parameters: Iterable[str], state: Mapping[str, Scalar], counters: Mapping[str, Scalar]) -> None:
        """Adds what is kept for some parameters together, and what is counted in their group."""
        named = {**state, **{OptimizerState.GROUP + key: value for key, value in counters.items()}}
        for parameter in parameters:
            for key, value in named.items():
                self.scalars.setdefault(key, {})[parameter] = value


def scalars_of(state: OptimizerState, parameter: str) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
    """The scalars of a parameter: those that are kept for it, and those that are counted in its group."""
    own: dict[str, Scalar] = {}
    counters: dict[str, Scalar] = {}
    for key, values in state.scalars.items():
        if parameter in values:
            if key.startswith(OptimizerState.GROUP):
                counters[key.removeprefix(OptimizerState.GROUP)] = values[parameter]
            else:
                own[key] = values[parameter]
    return own, counters
