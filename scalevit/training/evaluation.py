"""Evaluation on a validation set that is split over ranks, every sample exactly once, for every set of weights."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from scalevit.config.base import SelectionMetric
from scalevit.data.faults import Fault, FaultLog
from scalevit.data.loading.evaluation_loader import EvaluationLoader
from scalevit.distributed import World
from scalevit.engines.base import Engine
from scalevit.runs.summary import EMA, WEIGHTS, record_key, score_of
from scalevit.training.metrics import Predictions, metrics_of
from scalevit.training.predictions import PredictionLog
from scalevit.training.setting_keys import naming_data_settings
from scalevit.training.tasks.base import Form, Forward
from scalevit.training.weight_sets import WeightSets


@dataclass(frozen=True)
class CheckedMetrics:
    """The metrics of one set of weights, and the validation samples that are bad."""

    metrics: Mapping[str, float]
    """By name; top-k in percent."""
    faults: list[Fault]
    """Distinct samples. Those that cannot be decoded count as wrong; those that the index leaves out count nowhere."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of every set of weights at one step."""

    metrics: Mapping[str, Mapping[str, float]]
    """By name of the weight set and of the metric; top-k in percent."""

    def score(self, metric: SelectionMetric) -> float:
        """What the best checkpoint is chosen by, the highest: the EMA's, where there is one."""
        return score_of(self.metrics[EMA if EMA in self.metrics else WEIGHTS][metric], metric)

    def to_record(self) -> dict[str, float]:
        """The metrics by their keys in metrics.jsonl: "top1", "ema_top1"."""
        return {
            record_key(weight_set, name): value
            for weight_set, metrics in self.metrics.items()
            for name, value in metrics.items()
        }

    def __str__(self) -> str:
        labels = {WEIGHTS: "weights", EMA: "EMA"}
        return "; ".join(f"{labels[name]} {_accuracies(metrics)}" for name, metrics in self.metrics.items())


def _accuracies(metrics: Mapping[str, float]) -> str:
    """For example "top-1 97.22 %, top-5 100.00 %, top-1 width_0.5 95.00 %"."""
    text = f"top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} %"
    forms = {name.removeprefix("top1_"): value for name, value in metrics.items() if name.startswith("top1_")}
    return ", ".join([text, *(f"top-1 {form} {value:.2f} %" for form, value in forms.items())])


def evaluate_weight_sets(
    sets: WeightSets,
    engine: Engine,
    loader: EvaluationLoader,
    forms: Mapping[str, Form],
    *,
    channels_last: bool,
    faults: list[Fault],
    log: PredictionLog | None = None,
) -> Evaluation:
    """Evaluates each set of weights. Collective; arguments as for `evaluate`, but for:

    Args:
        log: of the last set, which is the EMA where there is one.

    Raises:
        UserError: as `evaluate`.
    """
    metrics = {}
    for name in sets.names:
        with sets.using(name):
            own = log if name == sets.names[-1] else None
            metrics[name] = evaluate(engine, loader, forms, channels_last=channels_last, faults=faults, log=own)
    return Evaluation(metrics)


def evaluate_within_limit(
    engine: Engine,
    loader: EvaluationLoader,
    forms: Mapping[str, Form],
    *,
    channels_last: bool,
    max_faults: int,
) -> CheckedMetrics:
    """Evaluates the engine's present weights and counts the bad samples, without a run folder. Collective.

    Args:
        max_faults: maximum number of bad samples, those included that the index leaves out.

    Raises:
        UserError: as `evaluate`, or there are more bad samples; on every rank.
    """
    faults: list[Fault] = []
    metrics = evaluate(engine, loader, forms, channels_last=channels_last, faults=faults)
    return _within_limit(metrics, loader, engine.world.gather(faults), max_faults)


def measure_within_limit(
    forward: Forward, world: World, loader: EvaluationLoader, *, max_faults: int
) -> CheckedMetrics:
    """Likewise of a model without an engine, for example an exported one.

    Args:
        forward: normalised images (b, C, H, W) on the world's device -> logits (b, classes).
        max_faults: as for `evaluate_within_limit`.

    Raises:
        UserError: as `evaluate_within_limit`.
    """
    faults: list[Fault] = []
    metrics = _measure(forward, world, loader, {"": nullcontext}, channels_last=False, faults=faults)
    return _within_limit(metrics, loader, world.gather(faults), max_faults)


def _within_limit(
    metrics: Mapping[str, float], loader: EvaluationLoader, faults: list[Fault], max_faults: int
) -> CheckedMetrics:
    with naming_data_settings():
        found = FaultLog(None, limit=max_faults).add([*loader.dataset.index.faults, *faults])
        return CheckedMetrics(metrics, found)


def evaluate(
    engine: Engine,
    loader: EvaluationLoader,
    forms: Mapping[str, Form],
    *,
    channels_last: bool = False,
    faults: list[Fault] | None = None,
    log: PredictionLog | None = None,
) -> dict[str, float]:
    """Evaluates the engine's present weights. Collective.

    Rows that pad the last batches carry weight 0.

    Args:
        engine: holds the weights.
        loader: of this rank.
        forms: of the model (`Task.forms`); every image is evaluated in each.
        channels_last: memory format of the images.
        faults: this rank's bad samples are added to it.
        log: this rank's predictions of the first form are added to it.

    Returns:
        Every metric of `metrics_of`, by its name and the suffix of the form: "top1", "top1_width_0.5".

    Raises:
        UserError: a shard cannot be read; on every rank.
    """
    engine.eval()
    world = engine.world
    metrics = _measure(engine.forward, world, loader, forms, channels_last=channels_last, faults=faults, log=log)
    engine.train()
    return metrics


@torch.no_grad()
def _measure(
    forward: Forward,
    world: World,
    loader: EvaluationLoader,
    forms: Mapping[str, Form],
    *,
    channels_last: bool,
    faults: list[Fault] | None,
    log: PredictionLog | None = None,
) -> dict[str, float]:
    device = world.device
    layout = torch.channels_last if channels_last else torch.contiguous_format
    measured = metrics_of(real_labels=loader.has_real_labels)
    # By form and metric: the sum over images, and their number.
    totals = torch.zeros(len(forms), len(measured), 2, dtype=torch.float64, device=device)
    batches = iter(loader)
    for _ in range(len(loader)):
        with world.collective_errors(), naming_data_settings():
            batch = next(batches)
        if faults is not None:
            faults += batch.faults
        pixels = batch.images.to(device, non_blocking=True).contiguous(memory_format=layout)
        images = loader.finish(pixels)
        labels = batch.labels.to(device, non_blocking=True)
        weights = batch.weights.to(device, torch.float64)
        for index, (total, form) in enumerate(zip(totals, forms.values(), strict=True)):
            with form():
                logits = forward(images)
            real_labels = batch.real_labels.to(device) if loader.has_real_labels else None
            predictions = Predictions(logits.float(), labels, batch.decoded.to(device), real_labels)
            for row, metric in zip(total, measured.values(), strict=True):
                counted = weights if metric.counts is None else weights * metric.counts(predictions)
                row += torch.stack([(metric.of_images(predictions).double() * counted).sum(), counted.sum()])
            if log is not None and index == 0:
                log.add(pixels, predictions, weights)
    metrics = {}
    for suffix, rows in zip(forms, world.all_reduce_sum(totals).tolist(), strict=True):
        for (name, metric), (total, count) in zip(measured.items(), rows, strict=True):
            whole = metric.counts is not None or count == len(loader.dataset)
            assert whole, f"evaluated {count:g} of {len(loader.dataset)} samples"
            metrics[f"{name}_{suffix}" if suffix else name] = metric.scale * total / count
    return metrics
