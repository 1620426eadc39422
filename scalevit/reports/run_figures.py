"""The figures of one run: losses, accuracies, learning rate, gradient norm, speed, and the confusion of classes.

Knows one run's records. Must not know the page around them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scalevit.reports import svg
from scalevit.reports.curves import Figure, Points, line_figure, thinned, told
from scalevit.reports.predictions import SavedPredictions
from scalevit.reports.runs import WEIGHT_SETS, Run
from scalevit.reports.svg import Point, Series
from scalevit.reports.tables import Column, Table, number_cell, text_cell
from scalevit.runs.records import number
from scalevit.runs.summary import record_key

MOST_CLASSES = 30
"""Of a confusion matrix that is drawn."""


@dataclass(frozen=True)
class _Line:
    """One line of a figure."""

    label: str
    records: Sequence[Mapping[str, Any]]
    key: str

    def points(self, x_key: str) -> Points:
        placed = [
            (number(record.get(x_key)), number(record.get(self.key))) for record in self.records if self.key in record
        ]
        return [(x, y) for x, y in placed if x is not None]


def figures_of_run(run: Run, predictions: SavedPredictions | None) -> list[Figure]:
    """All that there are numbers for."""
    sets = WEIGHT_SETS.items()
    losses = [
        _Line("training", run.training, "loss"),
        *(_Line(f"validation, {shown}", run.evaluations, record_key(name, "loss")) for name, shown in sets),
    ]
    accuracies = [_Line(shown, run.evaluations, record_key(name, "top1")) for name, shown in sets]
    found = [
        _figure("loss", "Loss", losses, "step", "loss", ".4g"),
        _figure("top1", "Top-1", accuracies, "epoch", "top-1, %", ".2f"),
        _figure("learning-rate", "Learning rate", [_Line("", run.training, "lr")], "step", "learning rate", ".3g"),
        _figure("grad-norm", "Gradient norm", [_Line("", run.training, "grad_norm")], "step", "norm", ".3g"),
        _figure("speed", "Speed", [_Line("", run.training, "images_per_second")], "step", "images per second", ".4g"),
        _confusion(predictions),
    ]
    return [figure for figure in found if figure is not None]


def _figure(identity: str, title: str, lines: Sequence[_Line], x_key: str, y_label: str, shape: str) -> Figure | None:
    series = []
    for color, line in enumerate(lines):
        label = line.label or title
        points = [Point(x, y, None, told(label, x_key, x, y, shape)) for x, y in thinned(line.points(x_key))]
        if any(point.y is not None for point in points):
            series.append(Series(label, color, points))
    return line_figure(identity, title, "", series, x_key, y_label) if series else None


def _confusion(predictions: SavedPredictions | None) -> Figure | None:
    if predictions is None or predictions.confusion is None:
        return None
    names = predictions.class_names
    if not 2 <= len(names) <= MOST_CLASSES:
        return None
    counts = [
        [predictions.confusion.get((row, column), 0) for column in range(len(names))] for row in range(len(names))
    ]
    right, total = sum(counts[index][index] for index in range(len(names))), sum(map(sum, counts))
    title = "Confusion of classes"
    described = f"{title}: {right} of {total} images have their own label. The table below has the numbers."
    caption = f"Of the {WEIGHT_SETS.get(predictions.weight_set, '')} at epoch {predictions.epoch}."
    columns = [
        Column("label", "label", is_text=True),
        *(Column(f"as_{i}", f"as {name}") for i, name in enumerate(names)),
    ]
    rows = [
        [text_cell(name), *(number_cell(count, "d", "") for count in line)]
        for name, line in zip(names, counts, strict=True)
    ]
    chart = svg.matrix_chart("confusion", described, names, counts, "label", "predicted class")
    return Figure("confusion", title, caption, chart, [], Table("confusion", f"{title}: numbers", columns, rows))
