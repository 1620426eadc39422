"""Groups of runs: those whose settings differ only in the seed and in what does not change results or speed.

Knows runs and their settings as plain JSON values. Must not know how groups are shown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scalevit.config.keys import flat_settings
from scalevit.errors import UserError, nearest_hint
from scalevit.reports.runs import Accuracy, Run
from scalevit.reports.statistics import Spread, spread_of
from scalevit.training.setting_changes import OF_THE_FOLDER, is_under

IGNORED = ("$schema", "about", "extends", "seed", *OF_THE_FOLDER)
"""Settings and sections in which runs of one group may differ."""
_STRATEGY = "reduction.strategy"
_ABSENT = "(not set)"


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds only."""

    label: str
    """Short and unique among the groups of a report."""
    settings: Mapping[str, Any]
    """By key, those of `IGNORED` left out."""
    runs: Sequence[Run]
    """All of them."""
    counted: Sequence[Run]
    """The finished ones, one for each seed: what means and tests are computed from."""
    notes: Sequence[str] = ()

    def accuracies(self, weight_set: str) -> list[Accuracy | None]:
        """Of every counted run."""
        return [run.accuracy.get(weight_set) for run in self.counted]

    def spread(self, weight_set: str, measure: str) -> Spread | None:
        """Over the counted runs, of an attribute of `Accuracy`; None if there is no run, or one lacks it: the mean of
        the others would be too good where a run has failed."""
        return spread_of([None if own is None else getattr(own, measure) for own in self.accuracies(weight_set)])


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[Run]]:
    """The groups, ordered by label, and the runs that belong to none because their config cannot be read."""
    members: dict[str, list[Run]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.config is not None:
            own = {key: value for key, value in flat_settings(run.config) if not is_under(key, IGNORED)}
            key = json.dumps(own, sort_keys=True)
            members.setdefault(key, []).append(run)
            settings[key] = own
    labels = _labels([settings[key] for key in members])
    groups = [_group(label, settings[key], members[key]) for label, key in zip(labels, members, strict=True)]
    return sorted(groups, key=lambda group: group.label), [run for run in runs if run.config is None]


def baseline_first(groups: Sequence[Group], baseline: str | None) -> tuple[list[Group], Group | None]:
    """The groups with the baseline first, and the baseline: the named one, or the only one without a reduction.

    Args:
        baseline: label of a group, or name of one of its runs.

    Raises:
        UserError: there is no group of that name.
    """
    if baseline is None:
        found = [group for group in groups if group.settings.get(_STRATEGY) == "none"]
        if len(found) != 1:
            return list(groups), None
    else:
        found = [group for group in groups if baseline in (group.label, *(run.name for run in group.runs))]
        if not found:
            hint = nearest_hint(baseline, [group.label for group in groups])
            listed = ", ".join(repr(group.label) for group in groups)
            raise UserError(f"--baseline {baseline!r}: no group or run of that name{hint} (groups: {listed})")
    return [found[0], *(group for group in groups if group is not found[0])], found[0]


def differing_settings(groups: Sequence[Group]) -> dict[str, list[str]]:
    """By key, the value of each group as JSON, of the settings that are not the same in all groups."""
    return _differing([group.settings for group in groups])


def _differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    keys = dict.fromkeys(key for own in settings for key in own)
    values = {key: [json.dumps(own[key]) if key in own else _ABSENT for own in settings] for key in keys}
    return {key: shown for key, shown in values.items() if len(set(shown)) > 1}


def _group(label: str, settings: Mapping[str, Any], runs: Sequence[Run]) -> Group:
    counted: dict[int | None, Run] = {}
    notes = []
    for run in runs:
        if run.state != "finished":
            notes.append(f"{run.name} does not count: {run.state}")
        elif run.seed in counted:
            notes.append(f"{run.folder} does not count: {counted[run.seed].folder} has the same seed and settings")
        else:
            counted[run.seed] = run
    return Group(label, settings, runs, list(counted.values()), notes)


def _labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each: its reduction, and the values of as few further settings as tell the groups apart."""
    differing = _differing(settings)
    chosen: list[str] = []
    if _STRATEGY in differing or not differing:
        chosen.append(_STRATEGY)
    while _distinct(differing, chosen) < len(settings):
        rest = [key for key in differing if key not in chosen]
        chosen.append(max(rest, key=lambda key: _distinct(differing, [*chosen, key])))
    return [", ".join(_named(own, key, chosen) for key in chosen) for own in settings]


def _distinct(differing: Mapping[str, Sequence[str]], keys: Sequence[str]) -> int:
    columns = [differing[key] for key in keys if key in differing]
    return len(set(zip(*columns, strict=True))) if columns else 1


def _named(own: Mapping[str, Any], key: str, chosen: Sequence[str]) -> str:
    """For example "grouped" or "lr=0.002"."""
    value = own.get(key, _ABSENT)
    text = value if isinstance(value, str) else json.dumps(value)
    if key == _STRATEGY:
        return text
    last = key.rpartition(".")[2]
    unique = sum(other.rpartition(".")[2] == last for other in chosen) == 1
    return f"{last if unique else key}={text}"
