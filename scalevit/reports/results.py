"""What groups of runs have reached and cost: tables of accuracy, of comparisons with a baseline, and of models.

Knows groups and statistics. Must not know how a table is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scalevit.reports.groups import Group, spread_of
from scalevit.reports.runs import WEIGHT_SETS, Run
from scalevit.reports.statistics import PairedTest, Spread, paired_test, with_holm
from scalevit.reports.tables import MISSING, Cell, Column, Table, number_cell, rate_cell, spread_cell, text_cell
from scalevit.runs.summary import EMA, WEIGHTS, record_key


def accuracy_table(groups: Sequence[Group]) -> Table:
    """Of every group and weight set: best and last accuracy over its finished runs."""
    measures = {
        "top1": ("best_top1_percent", "best top-1, %"),
        "top5": ("best_top5_percent", "best top-5, %"),
        "final_top1": ("last_top1_percent", "last top-1, %"),
        "final_top5": ("last_top5_percent", "last top-5, %"),
        "gap": ("peak_to_final_gap_points", "peak-to-final gap, pp"),
    }
    columns = [
        Column("group", "group", is_text=True),
        Column("weight_set", "weights", is_text=True),
        Column("seeds", "seeds"),
        *(Column(key, title, has_std=True) for key, title in measures.values()),
        Column("best_epoch", "best epoch", has_std=True),
        Column("images_per_second", "images/s", has_std=True),
    ]
    rows = []
    for group in groups:
        for weight_set, shown in WEIGHT_SETS.items():
            reason = why_missing(group, weight_set)
            rows.append(
                [
                    text_cell(group.label),
                    text_cell(shown),
                    Cell(str(len(group.counted)), len(group.counted)),
                    *(spread_cell(group.spread(weight_set, name), ".2f", reason) for name in measures),
                    spread_cell(group.spread(weight_set, "best_epoch"), ".1f", reason),
                    speed_cell(group),
                ]
            )
    notes = ["Mean ± standard deviation over seeds (n − 1) of finished runs. pp: percentage points, best minus last."]
    return Table("accuracy", "Accuracy", columns, rows, [*notes, *(note for group in groups for note in group.notes)])


def speed_cell(group: Group) -> Cell:
    """Images per second of training, over a group's finished runs."""
    reason = "no finished run" if not group.counted else "summary.json has none: no step was timed in a run"
    return rate_cell(group_speed(group), reason)


def group_speed(group: Group) -> Spread | None:
    """Over the counted runs; None if one has none."""
    return spread_of([run.of_summary("images_per_second") for run in group.counted])


def why_missing(group: Group, weight_set: str) -> str:
    """Why a group has no mean of an accuracy, if it has none."""
    if not group.counted:
        return "no finished run"
    own = group.accuracies(weight_set)
    if all(accuracy is None for accuracy in own) and not any(_was_evaluated(run, weight_set) for run in group.counted):
        return "the runs keep no EMA" if weight_set == EMA else "never evaluated"
    lacking = [
        run.name
        for run, accuracy in zip(group.counted, own, strict=True)
        if accuracy is None or accuracy.final_top1 is None or accuracy.final_top5 is None
    ]
    return f"an evaluation without a finite number, or missing, in {', '.join(lacking)}"


def _was_evaluated(run: Run, weight_set: str) -> bool:
    key = record_key(weight_set, "top1")
    return any(key in record for record in run.evaluations)


MEASURES = {"top1": "best top-1", "final_top1": "last top-1", "gap": "peak-to-final gap"}


@dataclass(frozen=True)
class Comparison:
    """A group against the baseline, in one measure of one weight set."""

    group: Group
    weight_set: str
    measure: str
    seeds: Sequence[int | None]
    test: PairedTest


def compare(groups: Sequence[Group], baseline: Group) -> list[Comparison]:
    """Paired tests of every group against the baseline, by seed. Holm's families are the groups of one measure."""
    found: list[Comparison] = []
    for weight_set in WEIGHT_SETS:
        for measure in MEASURES:
            before = _by_seed(baseline, weight_set, measure)
            family = []
            for group in groups:
                if group is not baseline:
                    own = _by_seed(group, weight_set, measure)
                    seeds = [seed for seed in own if seed in before]
                    test = paired_test([own[seed] - before[seed] for seed in seeds])
                    family.append(Comparison(group, weight_set, measure, seeds, test))
            corrected = with_holm([comparison.test for comparison in family])
            found += [
                Comparison(one.group, weight_set, measure, one.seeds, test)
                for one, test in zip(family, corrected, strict=True)
            ]
    return found


def _by_seed(group: Group, weight_set: str, measure: str) -> dict[int | None, float]:
    values = {
        run.seed: getattr(run.accuracy[weight_set], measure) for run in group.counted if weight_set in run.accuracy
    }
    return {seed: value for seed, value in values.items() if value is not None}


def comparison_table(groups: Sequence[Group], baseline: Group | None, comparisons: Sequence[Comparison]) -> Table:
    """One row for each comparison."""
    columns = [
        Column("group", "group", is_text=True),
        Column("weight_set", "weights", is_text=True),
        Column("measure", "measure", is_text=True),
        Column("difference_points", "mean difference, pp"),
        Column("low_points", "95 % from"),
        Column("high_points", "to"),
        Column("pairs", "n"),
        Column("df", "df"),
        Column("t", "t"),
        Column("p", "p"),
        Column("p_holm", "p (Holm)"),
        Column("remark", "remark", is_text=True),
    ]
    rows = [
        [
            text_cell(one.group.label),
            text_cell(WEIGHT_SETS[one.weight_set]),
            text_cell(MEASURES[one.measure]),
            _plain(one.test.mean, "+.2f"),
            _plain(one.test.low, "+.2f"),
            _plain(one.test.high, "+.2f"),
            Cell(str(one.test.n), one.test.n),
            _plain(one.test.df, "d"),
            _plain(one.test.t, ".3g"),
            _plain(one.test.p, ".2g"),
            _plain(one.test.p_holm, ".2g"),
            text_cell(one.test.reason or ""),
        ]
        for one in comparisons
    ]
    return Table("comparisons", "Comparisons", columns, rows, _comparison_notes(groups, baseline))


def _plain(value: float | None, shape: str) -> Cell:
    """The remark of the row has the reason."""
    return number_cell(value, shape, "")


def _comparison_notes(groups: Sequence[Group], baseline: Group | None) -> list[str]:
    if baseline is None:
        found = sum(group.settings.get("reduction.strategy") == "none" for group in groups)
        which = "no group is without a reduction" if not found else f"{found} groups are without a reduction"
        return [f"Nothing is compared: {which}. --baseline names the group to compare with."]
    if len(groups) == 1:
        return ["Nothing is compared: there is one group."]
    return [
        f"Each group minus {baseline.label}, paired by seed. Two-sided paired t-test, and 95 % confidence interval of "
        "the mean difference. p (Holm) is corrected for the number of groups that are compared in a measure, not for "
        "the number of measures."
    ]


def model_table(groups: Sequence[Group]) -> Table:
    """What a group's model costs, as its finished runs have recorded it."""
    shapes: dict[str, tuple[str, str, str]] = {
        "parameters": ("parameters", ",", "parameters"),
        "mlp_parameters": ("mlp_parameters", ",", "MLP parameters"),
        "unique_mlps": ("unique_mlps", ",", "unique MLPs"),
        "gmacs": ("gmacs", ".4g", "GMACs per image"),
    }
    columns = [Column("group", "group", is_text=True), *(Column(key, title) for key, _, title in shapes.values())]
    rows = [
        [text_cell(group.label), *(_agreed(group, key, shape) for key, (_, shape, _) in shapes.items())]
        for group in groups
    ]
    notes = [
        "GMACs: multiply-accumulates of one image's forward pass in 1e9, with attention, as the runs recorded them."
    ]
    return Table("models", "Models", columns, rows, notes)


def _agreed(group: Group, key: str, shape: str) -> Cell:
    values = {run.of_summary(key) for run in group.counted} - {None}
    if len(values) > 1:
        return Cell(MISSING, reason=f"the runs of {group.label} have recorded different ones")
    reason = "summary.json does not have it (a run of an older version)" if group.counted else "no finished run"
    return number_cell(next(iter(values), None), shape, reason)


@dataclass(frozen=True)
class MainResult:
    """What a reader looks for first in a group, as texts."""

    value: str
    what: str
    lines: Sequence[str]


def main_result(group: Group, baseline: Group | None) -> MainResult:
    """The last top-1, of the EMA where there is one, its mean difference to the baseline, and the model's size."""
    weight_set = EMA if any(group.accuracies(EMA)) else WEIGHTS
    spread = group.spread(weight_set, "final_top1")
    lines = []
    if spread is None:
        lines.append(why_missing(group, weight_set))
    if baseline is not None and group is not baseline:
        own, before = (_by_seed(one, weight_set, "final_top1") for one in (group, baseline))
        pairs = [own[seed] - before[seed] for seed in own if seed in before]
        if pairs:
            mean = number_cell(Spread.of(pairs).mean, "+.2f", "").text
            lines.append(f"{mean} pp against {baseline.label} ({_counted(len(pairs), 'pair')})")
    elif baseline is not None:
        lines.append("baseline")
    parameters = _agreed(group, "parameters", ",")
    if parameters.value is not None:
        lines.append(f"{parameters.text} parameters")
    shown = spread_cell(spread, ".2f", "")
    seeds = _counted(len(group.counted), "seed")
    return MainResult(
        shown.text if spread is None else f"{shown.text} %",
        f"last top-1 of the {WEIGHT_SETS[weight_set]}, {seeds}",
        lines,
    )


def _counted(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"
