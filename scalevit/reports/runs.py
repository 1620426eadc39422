"""Reads run folders: state, settings, records and accuracies, each as it is on the disk; what is missing is None.

Knows the files of a run folder. Must not know groups of runs, or how anything is shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalevit.errors import UserError
from scalevit.runs.records import number, read_object, read_records, section
from scalevit.runs.status import RunStatus, State, find_runs, read_status
from scalevit.runs.summary import EMA, WEIGHTS, record_key, score_of

WEIGHT_SETS = {EMA: "EMA", WEIGHTS: "weights"}
"""Name of each weight set -> how it is shown."""


@dataclass(frozen=True)
class Accuracy:
    """Of one weight set of one run, from its evaluation records; accuracies in percent."""

    top1: float
    """Of the best epoch."""
    top5: float
    """Of the best epoch."""
    best_epoch: int
    """From 1; the earliest of equal ones."""
    final_top1: float | None
    """Of the last evaluation; None if it has no finite number."""
    final_top5: float | None

    @property
    def gap(self) -> float | None:
        """Best minus last top-1, in percentage points."""
        return None if self.final_top1 is None else self.top1 - self.final_top1


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    state: State
    config: Mapping[str, Any] | None
    """None if it cannot be read."""
    summary: Mapping[str, Any] | None
    """Of a finished run."""
    environment: Mapping[str, Any]
    training: Sequence[Mapping[str, Any]]
    """Training records."""
    evaluations: Sequence[Mapping[str, Any]]
    """Evaluation records, one for each epoch."""
    events: Sequence[Mapping[str, Any]] = ()
    """Other records: of resumes, initial weights and tasks."""
    notes: Sequence[str] = ()
    """What a reader must know about the folder, e.g. its damaged lines."""
    accuracy: Mapping[str, Accuracy] = field(default_factory=dict)
    """By weight set; without those that have no finite evaluation."""

    @property
    def name(self) -> str:
        """As configured, else that of the folder."""
        return str((self.config or {}).get("name") or self.folder.name)

    @property
    def seed(self) -> int | None:
        seed = (self.config or {}).get("seed")
        return seed if type(seed) is int else None

    @property
    def step(self) -> int | None:
        """The last step that it has recorded."""
        steps = [record["step"] for record in (*self.training, *self.evaluations)]
        return max(steps, default=None)

    def of_summary(self, key: str) -> float | None:
        """A number of summary.json."""
        return number((self.summary or {}).get(key))


def find_run_folders(paths: Sequence[Path]) -> list[Path]:
    """The run folders among these folders and below them (`status.find_runs`), each once, in the order of their names.

    Raises:
        UserError: a path is not a folder or cannot be read, or there is no run folder.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: {'is a file, not a folder' if path.exists() else 'no such folder'}")
        try:
            found = {folder.resolve(): folder for folder in find_runs(path)} | found
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not found:
        listed = ", ".join(map(str, paths))
        raise UserError(f"{listed}: no run folder in it or below (one with config.json and metrics.jsonl)")
    return sorted(found.values(), key=lambda folder: [_natural(part) for part in folder.parts])


def _natural(text: str) -> tuple[str, int, str]:
    """Sorts seed-2 before seed-10."""
    stem = text.rstrip("0123456789")
    digits = text[len(stem) :]
    return stem, int(digits or -1), text


def read_run(folder: Path) -> Run:
    """Reads one run folder. What is damaged or missing is in its notes.

    Raises:
        UserError: a file exists and cannot be opened.
    """
    notes: list[str] = []
    config = _read_object(folder / "config.json", notes, needed=True)
    summary = _read_object(folder / "summary.json", notes)
    try:
        records, damaged = read_records(folder / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"{folder / 'metrics.jsonl'}: cannot be read ({error.strerror or error})") from None
    if damaged:
        notes.append(f"{damaged} damaged line{'s' if damaged > 1 else ''} of metrics.jsonl left out")
    evaluations = {
        record["epoch"]: record
        for record in records
        if record.get("kind") == "evaluation" and type(record.get("epoch")) is int
    }
    metric = str(section(config or {}, "evaluation").get("metric", "top1"))
    accuracy = {}
    for weight_set in WEIGHT_SETS:
        found = accuracy_of(list(evaluations.values()), weight_set, metric)
        if found is not None:
            accuracy[weight_set] = found
    status = read_status(folder)
    if status.state != "finished":
        notes.append(_why_unfinished(status, records))
    notes += _disagreements(summary, accuracy)
    training = [record for record in records if record.get("kind") == "train"]
    environment = _read_object(folder / "environment.json", notes) or {}
    events = [record for record in records if record.get("kind") not in ("train", "evaluation")]
    return Run(
        folder,
        status.state,
        config,
        summary,
        environment,
        training,
        list(evaluations.values()),
        events,
        notes,
        accuracy,
    )


def accuracy_of(evaluations: Sequence[Mapping[str, Any]], weight_set: str, metric: str) -> Accuracy | None:
    """Best and last evaluation of a weight set; None if none of them has finite numbers.

    Args:
        evaluations: in the order of their epochs.
        metric: what the best is chosen by, as in summary.json.
    """
    keys = {name: record_key(weight_set, name) for name in ("top1", "top5", metric)}
    own = [record for record in evaluations if keys["top1"] in record]
    valid = [record for record in own if all(number(record.get(key)) is not None for key in keys.values())]
    if not valid:
        return None
    best = max(valid, key=lambda record: score_of(record[keys[metric]], metric))  # type: ignore[arg-type]
    last = own[-1]
    return Accuracy(
        top1=best[keys["top1"]],
        top5=best[keys["top5"]],
        best_epoch=best["epoch"],
        final_top1=number(last.get(keys["top1"])),
        final_top5=number(last.get(keys["top5"])),
    )


def _read_object(path: Path, notes: list[str], *, needed: bool = False) -> dict[str, Any] | None:
    content, problem = read_object(path)
    if problem is not None:
        notes.append(problem)
    elif needed and not path.exists():
        notes.append(f"no {path.name}")
    return content or None


def _why_unfinished(status: RunStatus, records: Sequence[Mapping[str, Any]]) -> str:
    last = f"last record at step {records[-1]['step']:,}" if records else "no records"
    match status.state:
        case "running":
            return "still running"
        case "failed":
            return f"failed ({status.problem}); {last}"
        case "not started":
            return "not started"
    return f"no summary.json ({last}): interrupted, failed, or running on another machine"


def _disagreements(summary: Mapping[str, Any] | None, accuracy: Mapping[str, Accuracy]) -> list[str]:
    """Where metrics.jsonl has other accuracies than summary.json: evaluations are missing in one of them."""
    if summary is None:
        return []
    notes = []
    for weight_set, said_of in ((WEIGHTS, summary), (EMA, section(summary, EMA))):
        found = accuracy.get(weight_set)
        for key in ("top1", "final_top1"):
            said, counted = number(said_of.get(key)), None if found is None else getattr(found, key)
            if said is not None and said != counted:
                has = "none" if counted is None else f"{counted:.2f}"
                label = WEIGHT_SETS[weight_set]
                notes.append(f"{label} {key}: summary.json has {said:.2f}, metrics.jsonl, used here, has {has}")
    return notes
