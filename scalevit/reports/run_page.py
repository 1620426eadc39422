"""The page of one run, `report.html` in its folder: how far it is, curves, predictions, worst classes, faults, events.

Knows one run folder. It is written again at each evaluation, and never ends a run.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from scalevit import __version__
from scalevit.config.keys import flat_settings
from scalevit.files import write_whole
from scalevit.reports.inventory import environment_table
from scalevit.reports.page import Section, cards_html, document, figures_html, table_section
from scalevit.reports.predictions import SavedImage, SavedPredictions, read_predictions
from scalevit.reports.run_figures import figures_of_run
from scalevit.reports.runs import WEIGHT_SETS, Run, read_run
from scalevit.reports.statistics import Spread
from scalevit.reports.tables import MISSING, Cell, Column, Table, number_cell, rate_cell, text_cell
from scalevit.runs.records import number

PAGE = "report.html"
_MOST_ROWS = 20
"""Of the tables of classes, faults and events."""


def refresh_run_page(folder: Path) -> Path | None:
    """Writes the page of a run; None, after a warning, where it cannot be written."""
    try:
        page = run_page(folder, now=datetime.now().astimezone())
        write_whole(folder / PAGE, page.encode(errors="backslashreplace"), durable=False)
    except Exception as error:  # of any kind: a page must not end a run, which may have taken days
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"warning: {folder / PAGE} is not written ({reason})", file=sys.stderr, flush=True)
        return None
    return folder / PAGE


def run_page(folder: Path, *, now: datetime) -> str:
    """The page as HTML.

    Raises:
        UserError: a file of the run exists and cannot be opened.
    """
    run, predictions = read_run(folder), read_predictions(folder)
    sections = [
        Section("overview", "Overview", cards_html(_cards(run)) + _remarks(run)),
        Section("figures", "Figures", figures_html(figures_of_run(run, predictions))),
    ]
    if predictions is not None:
        sections += _prediction_sections(predictions)
    tables = [_events(run), _faults(folder), environment_table([run]), _settings(run)]
    sections += [table_section(table) for table in tables if table.rows]
    files = "".join(
        f'<li><a href="{name}">{name}</a></li>'
        for name in ("config.json", "environment.json", "metrics.jsonl", "summary.json", "data_faults.jsonl")
        if (folder / name).exists()
    )
    sections.append(Section("files", "Files", f"<ul>{files}</ul>"))
    origin = f"Made {now:%Y-%m-%d %H:%M} by scalevit {__version__} from {folder}."
    return document(run.name, _lead(run), origin, sections)


def _lead(run: Run) -> str:
    settings = run.config or {}
    reduction = settings.get("reduction")
    strategy = reduction.get("strategy") if isinstance(reduction, Mapping) else None
    parts = [
        "" if strategy is None else f"reduction {strategy}",
        "" if run.seed is None else f"seed {run.seed}",
        run.state,
        "no steps recorded" if run.step is None else f"{run.step:,} steps recorded",
    ]
    return ", ".join(part for part in parts if part) + "."


def _cards(run: Run) -> list[tuple[str, str, Sequence[str]]]:
    cards: list[tuple[str, str, Sequence[str]]] = []
    for weight_set, shown in WEIGHT_SETS.items():
        own = run.accuracy.get(weight_set)
        if own is not None:
            last = MISSING if own.final_top1 is None else f"{own.final_top1:.2f} %"
            lines = [f"best top-1, at epoch {own.best_epoch}", f"last top-1 {last}", f"top-5 {own.top5:.2f} %"]
            cards.append((shown, f"{own.top1:.2f} %", lines))
    speed = run.of_summary("images_per_second")
    if speed is not None:
        cards.append(("Speed", rate_cell(Spread(speed, None, 1), "").text, ["images per second in training steps"]))
    parameters, mlps = run.of_summary("parameters"), run.of_summary("unique_mlps")
    if parameters is not None:
        cards.append(("Model", f"{parameters:,}", ["parameters", *([f"{mlps} unique MLPs"] if mlps else [])]))
    return cards or [("No result yet", MISSING, ["nothing has been evaluated"])]


def _remarks(run: Run) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in run.notes)}</ul>' if run.notes else ""


# --- predictions ------------------------------------------------------------------------------------------


def _prediction_sections(predictions: SavedPredictions) -> list[Section]:
    sections = []
    which = f"the {WEIGHT_SETS[predictions.weight_set]} at epoch {predictions.epoch}"
    for identity, title, images, about in (
        ("examples", "Examples", predictions.examples, f"Validation images with the prediction of {which}."),
        ("mistakes", "Surest mistakes", predictions.mistakes, f"Validation images that {which} gets wrong."),
    ):
        if images:
            shown = "".join(_figure_of(image, predictions) for image in images)
            content = f'<p class="small">{escape(about)}</p><ul class="images">{shown}</ul>'
            sections.append(Section(identity, title, content))
    if predictions.confusion:
        sections.append(table_section(_classes(predictions)))
    return sections


def _figure_of(image: SavedImage, predictions: SavedPredictions) -> str:
    label, predicted = predictions.name(image.label), predictions.name(image.predicted)
    kind = "right" if image.label == image.predicted else "wrong"
    text = f"{label}" if kind == "right" else f"{label}, taken for {predicted}"
    return (
        f'<li class="{kind}"><img src="data:image/png;base64,{image.png}" width="72" height="72" '
        f'alt="validation image of class {escape(label)}"><span>{"✓" if kind == "right" else "✗"} {escape(text)}</span>'
        f'<span class="small">{image.probability:.0%}</span></li>'
    )


def _classes(predictions: SavedPredictions) -> Table:
    columns = [
        Column("class", "class", is_text=True),
        Column("images", "images"),
        Column("right", "right"),
        Column("top1", "top-1, %"),
        Column("taken_for", "most often taken for", is_text=True),
    ]
    rows = []
    for label, images, right, most in predictions.by_class()[:_MOST_ROWS]:
        other = "" if most is None else f"{predictions.name(most[0])} ({most[1]})"
        cells = [Cell(f"{images:,}", images), Cell(f"{right:,}", right), number_cell(100 * right / images, ".2f", "")]
        rows.append([text_cell(predictions.name(label)), *cells, text_cell(other)])
    count = len(predictions.by_class())
    notes = [f"The {_MOST_ROWS} worst of {count} classes."] if count > _MOST_ROWS else []
    return Table("classes", "Worst classes", columns, rows, notes)


# --- what happened ----------------------------------------------------------------------------------------


def _events(run: Run) -> Table:
    """Resumes with changed settings, skipped steps, and losses that were not finite."""
    found: list[tuple[float, str, str]] = []
    for record in run.events:
        changes = record.get("changes")
        changed = (
            "; ".join(f"{key}: {json.dumps(value)}" for key, value in changes.items())
            if isinstance(changes, Mapping)
            else ""
        )
        found.append((record["step"], str(record.get("kind")), f"changed: {changed}" if changed else ""))
    for record in run.training:
        if skipped := number(record.get("skipped")):
            found.append(
                (record["step"], "skipped steps", f"{skipped:g} since the record before: gradients overflowed")
            )
        if "loss" in record and number(record.get("loss")) is None:
            found.append((record["step"], "training loss", "is not a finite number"))
    columns = [
        Column("step", "step"),
        Column("event", "event", is_text=True),
        Column("details", "details", is_text=True),
    ]
    ordered = sorted(found, key=lambda event: event[0])
    rows = [
        [number_cell(step, ",", ""), text_cell(kind), text_cell(details)]
        for step, kind, details in ordered[-_MOST_ROWS:]
    ]
    notes = [f"The last {_MOST_ROWS} of {len(ordered)}."] if len(ordered) > _MOST_ROWS else []
    return Table("events", "Events", columns, rows, notes)


def _faults(folder: Path) -> Table:
    """The last bad samples; lines that cannot be read are counted."""
    path = folder / "data_faults.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    records: list[Mapping[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, Mapping):
            records.append(record)
    columns = [Column(key, key, is_text=True) for key in ("shard", "key", "reason")]
    rows = [[text_cell(str(record.get(column.key, MISSING))) for column in columns] for record in records[-_MOST_ROWS:]]
    notes = [f"The last {_MOST_ROWS} of {len(records)}."] if len(records) > _MOST_ROWS else []
    if len(records) < len(lines):
        notes.append(f"{len(lines) - len(records)} damaged lines left out.")
    return Table("faults", "Bad samples", columns, rows, notes)


def _settings(run: Run) -> Table:
    columns = [Column("setting", "setting", is_text=True), Column("value", "value", is_text=True)]
    rows = [[text_cell(key), text_cell(json.dumps(value))] for key, value in flat_settings(run.config or {})]
    return Table("settings", "Settings", columns, rows)
