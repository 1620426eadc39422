"""What a checkpoint's record says of the optimizer's state: its class, its tensors, and all of its scalars.

    {"name": "NAdamW",
     "tensors": {"exp_avg": {"dtype": "float32", "shapes": null}},
     "scalars": [{"name": "step", "value": 7.0, "dtype": "float32", "parameters": null}]}

`shapes` null: every parameter has the tensor, in its own shape; else shapes by parameter. `dtype` null: a number of
Python's; else a tensor without dimensions. `parameters` null: the scalar belongs to every parameter; else to these.
"""

from collections.abc import Mapping
from typing import Any

import torch

from scalevit.engines.state import OptimizerState, Scalar, StateTensor


def to_record(state: OptimizerState, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """The record of a state.

    Args:
        shapes: of all parameters.
    """
    tensors = {
        name: {
            "dtype": _name(kept.dtype),
            "shapes": None if kept.shapes == dict(shapes) else {key: list(shape) for key, shape in kept.shapes.items()},
        }
        for name, kept in state.describe().items()
    }
    scalars = [entry for name, values in state.scalars.items() for entry in _entries(name, values, set(shapes))]
    return {"name": state.optimizer, "tensors": tensors, "scalars": scalars}


def _entries(name: str, values: Mapping[str, Scalar], everyone: set[str]) -> list[dict[str, Any]]:
    """A scalar's entries, one for each value that it has."""
    parameters: dict[tuple[Any, str | None], list[str]] = {}
    for parameter, value in values.items():
        key = (value.item(), _name(value.dtype)) if isinstance(value, torch.Tensor) else (value, type(value).__name__)
        parameters.setdefault(key, []).append(parameter)
    return [
        {
            "name": name,
            "value": value,
            "dtype": None if kind in ("bool", "int", "float") else kind,
            "parameters": None if set(own) == everyone else own,
        }
        for (value, kind), own in parameters.items()
    ]


def state_tensors(record: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> dict[str, StateTensor]:
    """The tensors that a record names.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is not such a record.
    """
    return {
        name: StateTensor(
            _dtype(kept["dtype"]),
            dict(shapes) if kept["shapes"] is None else {key: torch.Size(s) for key, s in kept["shapes"].items()},
        )
        for name, kept in record["tensors"].items()
    }


def state_scalars(record: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, dict[str, Scalar]]:
    """The scalars of a record, by name and parameter.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is not such a record.
    """
    scalars: dict[str, dict[str, Scalar]] = {}
    for entry in record["scalars"]:
        value = entry["value"]
        if entry["dtype"] is not None:
            value = torch.tensor(value, dtype=_dtype(entry["dtype"]))
        elif not isinstance(value, bool | int | float):
            raise TypeError(f"{entry['name']} is {type(value).__name__}")
        own = parameters if entry["parameters"] is None else entry["parameters"]
        scalars.setdefault(entry["name"], {}).update(dict.fromkeys(own, value))
    return scalars


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} is not a type of numbers")
    return found
