"""The page of one run: of a real one, which refreshes it, and of folders with little or damaged content."""

import base64
import json
from datetime import datetime
from pathlib import Path

import pytest

from html_page import Page
from run_folders import records, write_predictions, write_run
from scalevit.cli.main import main
from scalevit.reports import run_page as module
from scalevit.reports.predictions import read_predictions
from scalevit.reports.run_page import refresh_run_page, run_page

NOW = datetime(2026, 1, 2, 3, 4)


def test_a_run_refreshes_its_page_and_ends_with_its_path(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    refresh = refresh_run_page
    monkeypatch.setattr(
        module, "refresh_run_page", lambda folder: (page := refresh(folder), seen.append(page.read_text()))[0]
    )
    settings = [
        "train.epochs=2",
        "train.max_steps=2",
        "evaluation.every_epochs=1",
        "evaluation.examples=3",
        "data.workers=0",
        "engine.name=fsdp",  # DeepSpeed's starts once in a process
    ]
    model = ["model.kwargs.depth=2", "model.kwargs.embed_dim=24", "schedule.warmup_epochs=0", f"output_dir={tmp_path}"]
    data = [f"data.train={digits / 'train'}", f"data.validation={digits / 'validation'}"]
    main(["train", "--config", "quickstart", "name=run", *settings, *model, *data])
    output = capsys.readouterr().out
    assert output.rstrip().endswith(f"page: {tmp_path / 'run' / 'report.html'}")
    assert [", running," in page for page in seen] == [True, False]
    Page(seen[-1])
    assert seen[-1].count("data:image/png;base64,") == 6
    saved = read_predictions(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    right = sum(count for (label, predicted), count in saved.confusion.items() if label == predicted)
    assert sum(saved.confusion.values()) == 360
    assert 100 * right / 360 == pytest.approx(lines[-1]["ema_top1"], abs=1e-9), "the last evaluation of the EMA"
    assert (saved.weight_set, saved.epoch) == ("ema", 1)


def test_it_shows_what_there_is(tmp_path: Path) -> None:
    lines = records(0, 0.0)
    lines[3] |= {"skipped": 2, "loss": None}
    lines.append({"kind": "resume", "step": 40, "changes": {"optimizer.lr": [0.1, 0.2]}})
    folder = write_run(tmp_path / "a <run>", lines=lines)
    write_predictions(folder)
    fault = {"shard": "s-0.tar", "key": "k&1", "offset": 3, "reason": "truncated"}
    (folder / "data_faults.jsonl").write_text(f"{json.dumps(fault)}\nnonsense\n")
    page = run_page(folder, now=NOW)
    parsed = Page(page)
    assert {"loss", "top1", "learning-rate", "confusion", "examples", "mistakes", "classes", "events", "faults"} <= set(
        parsed.identities
    )
    assert not {"speed", "grad-norm"} & set(parsed.identities), "they were not recorded"
    for text in ("&lt;cat&gt;, taken for dog", "k&amp;1", "1 damaged lines left out", "gradients overflowed", "75%"):
        assert text in page
    assert "is not a finite number" in page
    assert "optimizer.lr: [0.1, 0.2]" in page
    assert "Made 2026-01-02 03:04" in page
    assert page.index(">owl<") < page.index(">&lt;cat&gt;</th>"), "the worst class first: 0 of 3, 7 of 10, 5 of 5"


@pytest.mark.parametrize(
    "changes",
    [
        {"confusion": [[0, 1]]},
        {"confusion": [[-1, 0, 4]]},
        {"examples": [{"label": 0, "predicted": 0, "probability": 1, "png": "javascript:alert(1)"}]},
        {"mistakes": [{"label": 0, "predicted": 0, "probability": 1, "png": base64.b64encode(b"<svg>").decode()}]},
        {"weight_set": "other"},
        {"epoch": None},
    ],
)
def test_damaged_predictions_are_left_out(changes: dict[str, object], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lines=records(0, 0.0))
    write_predictions(folder, **changes)
    assert read_predictions(folder) is None
    page = run_page(folder, now=NOW)
    Page(page)
    assert "javascript:" not in page


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    page = run_page(write_run(tmp_path / "run", finished=False), now=NOW)
    Page(page)
    assert "nothing has been evaluated" in page
    assert "no steps recorded" in page


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", lines=records(0, 0.0))
    (folder / "report.html").mkdir()
    assert refresh_run_page(folder) is None
    assert capsys.readouterr().err.startswith(f"warning: {folder / 'report.html'} is not written (IsADirectoryError")


def test_a_run_folder_is_not_the_folder_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", lines=records(0, 0.0))
    refresh_run_page(folder)
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path), "--output", str(folder)])
    assert "already exists" in capsys.readouterr().err
