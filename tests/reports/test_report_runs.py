"""What is read from folders of every kind: missing, empty, running, stopped, damaged and mixed ones; and groups."""

import json
from pathlib import Path
from typing import Any

import pytest

from run_folders import records, write_run
from scalevit.checkpoint.folder import lock
from scalevit.errors import UserError
from scalevit.files import is_locked
from scalevit.reports.groups import baseline_first, differing_settings, group_runs
from scalevit.reports.results import accuracy_table, compare, comparison_table, main_result, model_table, why_missing
from scalevit.reports.runs import Run, find_run_folders, read_run
from scalevit.reports.tables import Cell, Table


def evaluation(epoch: int, top1: float | None, **more: Any) -> dict[str, Any]:
    return {"kind": "evaluation", "step": epoch, "epoch": epoch, "top1": top1, "top5": 99.0, "loss": 0.1, **more}


def read(*folders: Path) -> list[Run]:
    return [read_run(folder) for folder in find_run_folders(folders)]


def test_runs_are_found_below_folders_once_and_in_order(tmp_path: Path) -> None:
    for name in ("sweep/b-10", "sweep/b-2", "a"):
        write_run(tmp_path / name)
    (tmp_path / "a" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "step-1" / "metrics.jsonl").write_text("")  # inside of a run
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config.json").write_text("{}")  # settings without a run
    (tmp_path / "notes.txt").write_text("")
    found = find_run_folders([tmp_path, tmp_path / "sweep", tmp_path / "a"])
    assert [folder.relative_to(tmp_path).as_posix() for folder in found] == ["a", "sweep/b-2", "sweep/b-10"]


def test_folders_without_runs_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no run folder in it or below"):
        find_run_folders([tmp_path])
    with pytest.raises(UserError, match="is a file, not a folder"):
        find_run_folders([tmp_path / "file"])
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_run_folders([tmp_path, tmp_path / "nowhere"])


def test_a_run_that_holds_its_folder_is_running_and_is_not_disturbed(tmp_path: Path) -> None:
    write_run(tmp_path / "run", lines=records(0, 0.0), finished=False)
    checkpoints = tmp_path / "run" / "checkpoints"
    held = lock(checkpoints)
    assert read_run(tmp_path / "run").state == "running"
    assert read_run(tmp_path / "run").notes == ["still running"]
    held.close()
    stopped = read_run(tmp_path / "run")
    assert (stopped.state, stopped.step) == ("interrupted", 80)
    lock(checkpoints).close()
    assert not is_locked(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_run_that_has_just_begun_has_no_numbers(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", finished=False))
    assert (run.state, run.step, run.accuracy, run.training, run.evaluations) == ("interrupted", None, {}, [], [])
    assert "no records" in run.notes[0]


def test_damaged_files_are_noted_and_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lines=[evaluation(1, 50.0), evaluation(2, 60.0)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval\n\n{"step": "3"}\n' + json.dumps(evaluation(3, 99.0)))  # the last is being written
    (folder / "summary.json").write_text("{")
    run = read_run(folder)
    assert run.notes[:2] == ["summary.json is damaged", "3 damaged lines of metrics.jsonl left out"]
    assert (run.state, run.accuracy["weights"].final_top1) == ("interrupted", 60.0)
    (folder / "config.json").write_text("[]")
    groups, ungrouped = group_runs(read(folder))
    assert groups == []
    assert [other.name for other in ungrouped] == ["run"]
    assert ungrouped[0].notes[0] == "config.json is damaged"


def test_an_evaluation_without_a_finite_number_is_not_the_best_and_not_replaced(tmp_path: Path) -> None:
    lines = [evaluation(1, 50.0), evaluation(2, None), evaluation(3, 60.0), evaluation(4, float("nan"))]
    folder = write_run(tmp_path / "none-0", lines=lines)
    write_run(tmp_path / "none-1", seed=1, lines=[evaluation(1, 70.0), evaluation(2, True), evaluation(3, 71.0)])
    run = read_run(folder)
    accuracy = run.accuracy["weights"]
    assert (accuracy.top1, accuracy.best_epoch, accuracy.final_top1, accuracy.gap) == (60.0, 3, None, None)
    (group,), _ = group_runs(read(tmp_path))
    assert group.spread("weights", "top1").mean == 65.5
    assert group.spread("weights", "final_top1") is None, "the mean of the other run would be too good"
    cell = row_of(accuracy_table([group]), 1)
    assert (cell["last_top1_percent"].text, cell["last_top1_percent"].value) == ("–", None)
    assert cell["last_top1_percent"].reason == "an evaluation without a finite number, or missing, in none-0"


def row_of(table: Table, index: int) -> dict[str, Cell]:
    return dict(zip([column.key for column in table.columns], table.rows[index], strict=True))


def test_the_best_is_chosen_as_the_run_chose_it(tmp_path: Path) -> None:
    lines = [evaluation(1, 50.0, loss=0.3), evaluation(2, 60.0, loss=0.2), evaluation(3, 60.0, loss=0.1)]
    lines[1]["loss"] = 0.05
    by_loss = write_run(tmp_path / "a", lines=lines, evaluation={"metric": "loss"})
    assert read_run(by_loss).accuracy["weights"].best_epoch == 2
    by_top1 = write_run(tmp_path / "b", lines=[*lines, evaluation(4, 60.0)])
    assert read_run(by_top1).accuracy["weights"].best_epoch == 2, "the earliest of equal ones"


def test_an_epoch_that_was_evaluated_twice_counts_once(tmp_path: Path) -> None:
    """A run that is resumed after a limit of steps evaluates the epoch in which it stopped again."""
    run = read_run(write_run(tmp_path / "run", lines=[evaluation(1, 50.0), evaluation(2, 80.0), evaluation(2, 70.0)]))
    assert [record["top1"] for record in run.evaluations] == [50.0, 70.0]
    assert run.accuracy["weights"].top1 == 70.0


def test_another_accuracy_in_the_summary_is_noted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lines=[evaluation(1, 50.0)])
    (folder / "summary.json").write_text(json.dumps({"top1": 80.0, "final_top1": 50.0, "ema": {"top1": 81.0}}))
    assert read_run(folder).notes == [
        "weights top1: summary.json has 80.00, metrics.jsonl, used here, has 50.00",
        "EMA top1: summary.json has 81.00, metrics.jsonl, used here, has none",
    ]


# --- groups -----------------------------------------------------------------------------------------------


def test_groups_differ_in_more_than_seeds_and_places(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", "grouped", seed, output_dir=f"x{seed}", data={"workers": seed, "train": "d"})
        write_run(tmp_path / f"b{seed}", "grouped", seed, optimizer={"lr": 0.01}, data={"workers": 0, "train": "d"})
    write_run(tmp_path / "c", "none", 1, data={"train": "d"})
    groups, _ = group_runs(read(tmp_path))
    assert [(group.label, len(group.counted)) for group in groups] == [
        ("grouped, lr=(not set)", 2),
        ("grouped, lr=0.01", 2),
        ("none, lr=(not set)", 1),
    ]
    assert differing_settings(groups) == {
        "reduction.strategy": ['"grouped"', '"grouped"', '"none"'],
        "optimizer.lr": ["(not set)", "0.01", "(not set)"],
    }
    ordered, baseline = baseline_first(groups, None)
    assert baseline is ordered[0] is groups[2]
    assert baseline_first(groups, "b2")[1] is groups[1]
    with pytest.raises(UserError, match=r"--baseline 'grouped, lr=0.02'.*nearest: grouped, lr=0.01"):
        baseline_first(groups, "grouped, lr=0.02")


def test_the_same_run_twice_counts_once(tmp_path: Path) -> None:
    lines = records(0, 0.0)
    for name in ("first", "second"):
        write_run(tmp_path / name, seed=3, lines=lines)
    (group,), _ = group_runs(read(tmp_path))
    assert [run.name for run in group.counted] == ["first"]
    assert "second does not count" in group.notes[0]


def test_without_an_ema_a_second_seed_or_a_baseline_nothing_is_made_up(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "none", 1, lines=records(1, 0.0, ema=False))
    write_run(tmp_path / "b", "grouped", 1, lines=records(2, 0.0, ema=False))
    write_run(tmp_path / "c", "thin", 2, lines=records(3, 0.0, ema=False))
    write_run(tmp_path / "d", "shallow", 2, lines=records(3, 0.0, ema=False), finished=False)
    groups, baseline = baseline_first(group_runs(read(tmp_path))[0], None)
    by_label = {group.label: group for group in groups}
    tests = {(one.group.label, one.weight_set, one.measure): one.test for one in compare(groups, baseline)}
    assert tests["grouped", "weights", "top1"].reason.startswith("too few seeds")
    assert tests["grouped", "weights", "top1"].p is None
    assert (tests["thin", "weights", "top1"].n, tests["thin", "weights", "top1"].mean) == (0, None)
    assert tests["grouped", "ema", "top1"].n == 0
    assert why_missing(by_label["grouped"], "ema") == "the runs keep no EMA"
    assert why_missing(by_label["shallow"], "weights") == "no finished run"
    notes = accuracy_table(groups).all_notes
    assert any("the runs keep no EMA" in note for note in notes)
    assert any("no finished run" in note for note in notes)
    result = main_result(by_label["grouped"], baseline)
    assert "±" not in result.value, "one seed has no spread"
    assert result.what == "last top-1 of the weights, 1 seed"
    assert main_result(by_label["shallow"], baseline).value == "–"
    without = comparison_table(groups[1:], None, [])
    assert without.all_notes == [
        "Nothing is compared: no group is without a reduction. --baseline names the group to compare with."
    ]


def test_costs_that_were_not_recorded_are_missing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", lines=records(1, 0.0))
    summary = json.loads((folder / "summary.json").read_text())
    del summary["unique_mlps"]
    (folder / "summary.json").write_text(json.dumps(summary))
    groups, _ = group_runs(read(tmp_path))
    cells = row_of(model_table(groups), 0)
    assert cells["unique_mlps"].text == "–"
    assert "older version" in cells["unique_mlps"].reason
    assert cells["parameters"].text == "678,634"
