"""The result of a run: best and last evaluated epoch of every weight set, and what summary.json says.

A weight set is a named set of weights that is evaluated: "weights" (the model's own) or "ema". Knows evaluation
records; must not know how a metric is computed or how a summary is printed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scalevit.config.base import SelectionMetric
from scalevit.runs.records import Record, finite

WEIGHTS, EMA = "weights", "ema"


def score_of(value: float, metric: str) -> float:
    """A metric as a number of which higher is better."""
    return -value if metric == "loss" else value


def record_key(weight_set: str, metric: str) -> str:
    """The key of a metric in an evaluation record: "top1" for the model's own weights, "ema_top1" for the EMA."""
    return metric if weight_set == WEIGHTS else f"{weight_set}_{metric}"


def best_epoch(epochs: Sequence[Record], weight_set: str, metric: SelectionMetric) -> Record:
    """The evaluation record with the best value of a metric, the earliest of equal ones.

    Args:
        epochs: evaluation records, at least one with this weight set.
    """
    key = record_key(weight_set, metric)
    return max(_evaluated_with(epochs, weight_set, metric), key=lambda record: score_of(record[key], metric))


def is_ema_best(records: Sequence[Record], metric: SelectionMetric) -> bool:
    """Whether the EMA's best evaluation is at least as good as that of the plain weights; True without evaluations."""
    epochs = [record for record in records if record.get("kind") == "evaluation"]
    plain, ema = (_evaluated_with(epochs, weight_set, metric) for weight_set in (WEIGHTS, EMA))
    if not plain or not ema:
        return bool(ema) or not plain
    values = (best_epoch(epochs, weight_set, metric)[record_key(weight_set, metric)] for weight_set in (WEIGHTS, EMA))
    best, best_of_ema = (score_of(value, metric) for value in values)
    return best_of_ema >= best


def _evaluated_with(epochs: Sequence[Record], weight_set: str, metric: str) -> list[Record]:
    """The records that have this weight set: an EMA may be turned on in the middle of a run."""
    return [record for record in epochs if record_key(weight_set, metric) in record]


@dataclass(frozen=True)
class AccuracySummary:
    """Best and last epoch of one weight set; accuracies in percent."""

    top1: float
    """Of the best epoch."""
    top5: float
    """Of the best epoch."""
    best_epoch: int
    """From 1."""
    final_top1: float
    final_top5: float
    peak_to_final_gap: float
    """Best minus last top-1, as in the paper."""

    @classmethod
    def of(cls, epochs: Sequence[Record], weight_set: str, metric: SelectionMetric) -> "AccuracySummary":
        """Summarises evaluation records, at least one of which has this weight set; the metric chooses the best."""
        best, last = best_epoch(epochs, weight_set, metric), _evaluated_with(epochs, weight_set, metric)[-1]
        top1, top5 = record_key(weight_set, "top1"), record_key(weight_set, "top5")
        return cls(
            top1=best[top1],
            top5=best[top5],
            best_epoch=best["epoch"],
            final_top1=last[top1],
            final_top5=last[top5],
            peak_to_final_gap=best[top1] - last[top1],
        )


@dataclass(frozen=True)
class Summary:
    """A finished run."""

    name: str
    weights: AccuracySummary
    ema: AccuracySummary | None
    images_per_second: float | None
    """Over all ranks, training steps only, without a process's first; None if there was no other."""
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1; None where the device's peak or the rate is not known."""
    steps: int
    """Optimizer steps done."""
    data_faults: int
    """Distinct bad samples."""
    epochs: int
    """As configured."""
    parameters: int
    mlp_parameters: int
    unique_mlps: int
    """MLPs with weights of their own: blocks that share one count once."""
    gmacs: float
    """Multiply-accumulates of one image's forward pass, in 1e9."""
    reduction: str
    engine: Mapping[str, Any]
    precision: str
    world_size: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """As in summary.json: the numbers of the model's own weights are at the top level."""
        fields = {key: finite(value) for key, value in asdict(self).items() if key not in (WEIGHTS, "name")}
        return {"name": self.name, **asdict(self.weights), **fields}
