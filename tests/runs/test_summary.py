"""Best and last epoch, and summary.json; the run folder's files."""

import json
from pathlib import Path
from typing import Any

import pytest

from scalevit.errors import UserError
from scalevit.runs.environment import describe_environment, package_versions
from scalevit.runs.folder import RunFolder
from scalevit.runs.summary import AccuracySummary, Summary, best_epoch, is_ema_best

EPOCHS: list[dict[str, Any]] = [
    {"epoch": 1, "top1": 50.0, "top5": 90.0, "loss": 1.0},
    {"epoch": 2, "top1": 70.0, "top5": 91.0, "loss": 0.8, "ema_top1": 60.0, "ema_top5": 92.0, "ema_loss": 0.9},
    {"epoch": 3, "top1": 70.0, "top5": 95.0, "loss": 0.7, "ema_top1": 65.0, "ema_top5": 93.0, "ema_loss": 0.6},
]


def summary(**changes: Any) -> Summary:
    values: dict[str, Any] = {
        "name": "a",
        "weights": AccuracySummary.of(EPOCHS, "weights", "top1"),
        "ema": AccuracySummary.of(EPOCHS, "ema", "top1"),
        "images_per_second": 10.0,
        "mfu": None,
        "steps": 3,
        "data_faults": 0,
        "epochs": 3,
        "parameters": 100,
        "mlp_parameters": 50,
        "unique_mlps": 3,
        "gmacs": 0.5,
        "reduction": "none",
        "engine": {"name": "fsdp"},
        "precision": "fp32",
        "world_size": 1,
        "seed": 42,
    }
    return Summary(**(values | changes))


def test_the_earliest_of_equal_epochs_is_the_best_and_the_gap_is_to_the_last() -> None:
    assert AccuracySummary.of(EPOCHS, "weights", "top1") == AccuracySummary(70.0, 91.0, 2, 70.0, 95.0, 0.0)
    falling = [*EPOCHS, {"epoch": 4, "top1": 68.5, "top5": 94.0, "ema_top1": 64.0, "ema_top5": 92.0}]
    assert AccuracySummary.of(falling, "weights", "top1").peak_to_final_gap == 1.5


def test_an_ema_that_began_later_is_summarised_from_there() -> None:
    assert AccuracySummary.of(EPOCHS, "ema", "top1") == AccuracySummary(65.0, 93.0, 3, 65.0, 93.0, 0.0)
    assert best_epoch(EPOCHS, "ema", metric="top5") is EPOCHS[2]


def test_the_lowest_loss_is_the_best() -> None:
    rising = [*EPOCHS[:2], {**EPOCHS[2], "loss": 0.9}]
    assert best_epoch(rising, "weights", "loss") is rising[1]
    assert best_epoch(rising, "weights", "top5") is rising[2]
    assert AccuracySummary.of(rising, "weights", "loss") == AccuracySummary(70.0, 91.0, 2, 70.0, 95.0, 0.0)
    assert is_ema_best([{"kind": "evaluation", **record} for record in EPOCHS], "loss")


def test_summary_json_has_the_models_own_numbers_at_the_top(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", writes=True)
    folder.open({"name": "a"}, describe_environment(1, "cpu"))
    folder.write_summary(summary(images_per_second=float("nan")).to_json())
    written = json.loads((folder.path / "summary.json").read_text())
    assert list(written) == [
        *("name", "top1", "top5", "best_epoch", "final_top1", "final_top5", "peak_to_final_gap", "ema"),
        *("images_per_second", "mfu", "steps", "data_faults", "epochs", "parameters", "mlp_parameters"),
        *("unique_mlps", "gmacs"),
        *("reduction", "engine", "precision", "world_size", "seed"),
    ]
    assert (written["best_epoch"], written["ema"]["best_epoch"], written["images_per_second"]) == (2, 3, None)
    assert summary(ema=None).to_json()["ema"] is None
    folder.open({"name": "a"}, {})
    assert not (folder.path / "summary.json").exists(), "a run that continues has no summary yet"


def test_ranks_other_than_the_first_write_nothing_and_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "run", writes=False)
    other.open({}, {})
    other.write_summary({})
    assert not other.path.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run folder .*file/run: cannot be written \(Not a directory\)"):
        RunFolder(tmp_path / "file" / "run", writes=True).open({}, {})


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert package_versions(["no-such-package-here"]) == {"no-such-package-here": None}
    environment = describe_environment(2, "cpu")
    assert environment["packages"]["torch"]
    assert (environment["world_size"], environment["device"]) == (2, "cpu")


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([], True),
        (EPOCHS, False),
        (EPOCHS[:1], False),
        ([{**EPOCHS[1], "ema_top1": 70.0}], True),
        ([{"epoch": 1, "loss": 0.1, "kind": "train"}], True),
    ],
)
def test_which_weights_were_better(epochs: list[dict[str, Any]], expected: bool) -> None:
    assert is_ema_best([{"kind": "evaluation", **record} for record in epochs], "top1") is expected
