"""Averages the weights of several trained models: a model soup (arXiv:2203.05482), uniform or greedy.

Sums are in fp64. One ingredient is in memory at a time.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scalevit.config.model import WEIGHTS_SETTINGS
from scalevit.errors import UserError
from scalevit.export.base import ModelDescription
from scalevit.export.source import Source
from scalevit.export.trained_model import read_model
from scalevit.models.mlps import transformer_blocks

Metrics = Mapping[str, float]
Measure = Callable[[nn.Module, ModelDescription], Metrics]
"""Metrics of a model by name; higher `top1` is better. It leaves the model as it is."""


@dataclass(frozen=True)
class Row:
    """One model of a soup's table."""

    name: str
    metrics: Metrics
    """Empty where nothing is evaluated."""
    used: bool = True
    """Whether it is part of the average."""


@dataclass(frozen=True)
class Soup:
    """An average of weights."""

    model: nn.Module
    """On the CPU."""
    description: ModelDescription
    """Of the first source."""
    ingredients: list[Row]
    """In the order in which they were tried."""
    metrics: Metrics


def average(sources: Sequence[Source], measure: Measure | None, *, greedy: bool = False) -> Soup:
    """The average of the sources' weights.

    Args:
        sources: of models of one structure, at least two.
        measure: evaluates each source and the result; None evaluates nothing.
        greedy: begin with the source of the highest top-1, and add one after the other, the better first, if the
            average's top-1 does not fall.

    Raises:
        UserError: two of them are not of one structure, or one cannot be read.
    """
    assert measure is not None or not greedy, "greedy needs a measure"
    first, description = read_model(sources[0])
    total: dict[str, Tensor] = {}
    rows: list[Row] = []
    for source in sources:
        model, own = (first, description) if source is sources[0] else read_model(source)
        _check_same(sources[0], (first, description), source, (model, own))
        if not greedy:
            _add(total, model)
        rows.append(Row(str(source), {} if measure is None else measure(model, own)))
    if greedy:
        assert measure is not None
        return _greedy(sources, rows, first, description, measure)
    _fill(first, total, len(sources))
    return Soup(first, description, rows, {} if measure is None else measure(first, description))


def _greedy(
    sources: Sequence[Source], rows: Sequence[Row], model: nn.Module, description: ModelDescription, measure: Measure
) -> Soup:
    """See `average`; `rows` are the measured sources, `model` is overwritten."""
    order = sorted(range(len(sources)), key=lambda index: -rows[index].metrics["top1"])
    total: dict[str, Tensor] = {}
    best: Metrics = {"top1": -1.0}
    used: list[int] = []
    for index in order:
        tried = {name: tensor.clone() for name, tensor in total.items()}
        _add(tried, read_model(sources[index])[0])
        _fill(model, tried, len(used) + 1)
        metrics = measure(model, description)
        if metrics["top1"] >= best["top1"]:
            total, best, used = tried, metrics, [*used, index]
    _fill(model, total, len(used))
    found = [Row(rows[index].name, rows[index].metrics, index in used) for index in order]
    return Soup(model, description, found, best)


@torch.no_grad()
def _add(total: dict[str, Tensor], model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        value = parameter.detach().to(torch.float64)
        total[name] = total[name].add_(value) if name in total else value.clone()


@torch.no_grad()
def _fill(model: nn.Module, total: Mapping[str, Tensor], count: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(total[name] / count)


def _check_same(
    first: Source,
    expected: tuple[nn.Module, ModelDescription],
    other: Source,
    found: tuple[nn.Module, ModelDescription],
) -> None:
    """Makes sure that two models compute the same function of their weights.

    Raises:
        UserError: names what differs.
    """
    models = (expected, found)
    made = [json.dumps(each.reduction.structure(len(transformer_blocks(model)))) for model, each in models]
    reductions: list[dict[str, Any]] = [{"the reduction": each} for each in made]
    tensors = [_tensors(*each) for each in models]
    if tensors[0] == tensors[1]:
        reductions = [{}, {}]  # two names of one structure
    for one, two in ([_settings(each) for _, each in models], reductions, tensors):
        for key in [*one, *two]:
            here, there = (structure.get(key, "missing") for structure in (one, two))
            if here != there:
                raise UserError(f"{other.path}: is not of the structure of {first.path}: {key} is {there}, not {here}")


def _settings(description: ModelDescription) -> dict[str, Any]:
    """What must be equal besides the tensors, by a name for messages."""
    excluded = {*WEIGHTS_SETTINGS, "drop_path", "drop_path_mode", "kwargs"}
    settings = description.model.model_dump(mode="json", exclude=excluded)
    # Rates of dropout act in training only.
    kwargs = {key: value for key, value in description.model.kwargs.items() if not key.endswith("drop_rate")}
    images = {f"the images' {key}": value for key, value in description.preprocessing.to_json().items()}
    return {**settings, **images, "kwargs": kwargs, "the list of class names": description.label_names}


def _tensors(model: nn.Module, description: ModelDescription) -> dict[str, Any]:
    """Which tensors are shared, and the shape of each."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {**{f"the tie of {name}": canonical for name, canonical in description.tied.items()}, **shapes}
