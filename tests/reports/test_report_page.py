"""The page, the Markdown and the command: whole, self-contained, escaped; clear where there is little to show."""

import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest

from html_page import Page
from run_folders import records, write_run
from scalevit.cli.main import main
from scalevit.reports.curves import MOST_POINTS
from scalevit.reports.figures import figures_of
from scalevit.reports.groups import group_runs
from scalevit.reports.runs import find_run_folders, read_run
from scalevit.reports.svg import tick_text, ticks_between

TABLES = ["accuracy", "comparisons", "models", "settings", "runs", "environments"]
FIGURES = [
    *("training-loss", "top1-ema", "top1-ema-late", "top1-weights", "top1-weights-late", "loss-ema", "loss-weights"),
    *("learning-rate", "gap-ema", "gap-weights", "throughput", "cost"),
]


def report(folder: Path, *options: str) -> str:
    main(["report", str(folder / "runs"), "--output", str(folder / "report"), *options])
    return (folder / "report" / "report.html").read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    for seed in (0, 1):
        write_run(folder / "runs" / f"none-{seed}", "none", seed, lines=records(seed, 0.0))
        write_run(folder / "runs" / f"thin-{seed}", "thin", seed, lines=records(5 + seed, -1.0))
    write_run(folder / "runs" / "a <b> & 'c'", "thin", 2, lines=records(8, -1.0, epochs=3), finished=False)
    write_run(folder / "runs" / "just-begun", "thin", 3, finished=False)
    return report(folder, "--title", "T <script>alert(1)</script>")


def test_the_page_is_whole_and_requests_nothing(page: str) -> None:
    parsed = Page(page)
    assert len(set(parsed.identities)) == len(parsed.identities)
    assert [name for name in (*TABLES, "figures", *FIGURES) if name not in parsed.identities] == []
    assert parsed.tags.count("svg") > parsed.tags.count("figure") == len(FIGURES)
    assert parsed.tags.count("details") == len(FIGURES), "a table behind each figure"
    assert {link.partition(":")[0] if ":" in link else link[:1] for link in parsed.links} == {"data", "#", "."}
    assert "http:" not in page
    assert "https:" not in page
    assert not re.search(r"url\(|@import|\bsrc=|fetch\(|XMLHttpRequest", page)
    anchors = {link[1:] for link in parsed.links if link.startswith("#")}
    assert anchors <= set(parsed.identities)


def test_texts_are_escaped(page: str) -> None:
    assert page.count("<script>") == 1
    assert "T &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a &lt;b&gt; &amp; &#x27;c&#x27;" in page
    assert "../runs/a%20%3Cb%3E%20%26%20%27c%27/config.json" in page


def test_figures_are_valid_and_show_values_on_hover(page: str) -> None:
    charts = re.findall(r'<svg class="chart".*?</svg>', page)
    assert len(charts) == len(FIGURES)
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.get("role") == "img"
        assert root.find("desc").text
        titles = [title.text for title in root.iter("title")]
        assert titles
        assert not re.search(r"\bnan\b|\binf\b|None", chart)
    assert "thin, epoch 8: " in page
    assert "(interrupted), epoch" not in page


def test_markdown_has_the_tables_with_links(page: str, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "x|y", lines=records(0, 0.0))
    report(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert r"| x\|y | none | 0 | finished | 80 | 8 |" in text
    assert "[config.json](../runs/x%7Cy/config.json)" in text
    widths = {len(re.findall(r"(?<!\\)\|", row)) - 1 for row in rows}
    assert widths == {10, 5, 14, 11}, "those of the tables that have rows"
    assert "## Accuracy" in text
    assert "Nothing is compared: there is one group." in text


def test_a_folder_of_runs_without_records_is_a_clear_page(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", finished=False)
    broken = write_run(tmp_path / "runs" / "b", finished=False)
    (broken / "config.json").unlink()
    text = report(tmp_path)
    Page(text)
    assert "1 group, 0 finished runs, 2 interrupted." in text
    assert "No run has recorded anything yet." in text
    assert "no config.json" in text
    assert (tmp_path / "report" / "comparisons.csv").read_text().count("\n") == 1, "headings only"


def test_the_command_reports_mistakes_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(SystemExit, match="2"):
        report(tmp_path)
    assert not (tmp_path / "report").exists()
    write_run(tmp_path / "runs" / "a", lines=records(0, 0.0))
    for names in (["notes.txt"], ["report.html"], ["report.html", "report.md"]):
        other = tmp_path / f"with-{len(names)}-{names[0]}"
        other.mkdir()
        for name in names:
            (other / name).write_text("of another program")
        with pytest.raises(SystemExit, match="2"):
            main(["report", str(tmp_path / "runs"), "--output", str(other)])
        assert {path.name: path.read_text() for path in other.iterdir()} == dict.fromkeys(names, "of another program")
    with pytest.raises(SystemExit, match="2"):
        report(tmp_path, "--baseline", "nothing")
    lines = capsys.readouterr().err.splitlines()
    assert ["error: " in line for line in lines] == [True] * 5
    for line, part in zip(
        lines, ["no run folder", "already exists", "already exists", "another folder", "groups: 'none'"], strict=True
    ):
        assert part in line


# --- curves and scales ------------------------------------------------------------------------------------


def test_a_missing_value_breaks_a_line_and_long_curves_are_thinned(tmp_path: Path) -> None:
    for seed in (0, 1):
        lines = [{"kind": "train", "step": step, "loss": 1.0 + seed, "lr": 0.1} for step in range(1, 1001)]
        lines[549]["loss"] = None if seed else 1.0
        lines[729]["loss"] = float("nan")  # as Python's json writes it
        write_run(tmp_path / f"run-{seed}", seed=seed, lines=lines)
    groups, _ = group_runs([read_run(folder) for folder in find_run_folders([tmp_path])])
    figure = figures_of(groups)[0]
    rows = [[cell.value for cell in row] for row in figure.table.rows]
    steps = [row[0] for row in rows]
    assert MOST_POINTS / 2 <= len(rows) <= MOST_POINTS
    assert steps[-1] == 1000, "the last is kept"
    assert len({b - a for a, b in pairwise(steps)}) == 1
    missing = [row[0] for row in rows if row[1] is None]
    assert missing == [step for step in steps if step in (550, 730)]
    assert len(missing) == 2
    assert {row[1] for row in rows if row[1] is not None} == {1.5}
    assert figure.chart.count("s0 line") == len(missing) + 1


@pytest.mark.parametrize(
    "ends", [(0.0, 1.0), (0.1, 0.1), (0.0, 0.0), (-3.2, 7.9), (1e-9, 3e-9), (97.1, 97.3), (5, 2e7)]
)
def test_ticks_are_round_and_enclose_the_data(ends: tuple[float, float]) -> None:
    ticks = ticks_between(*ends, 5)
    assert 3 <= len(ticks) <= 8
    assert ticks[0] <= ends[0] + 1e-12
    assert ticks[-1] >= ends[1] - 1e-12
    step = ticks[1] - ticks[0]
    assert round(step / 10 ** int(f"{step:e}".split("e")[1]), 6) in (1, 2, 5)


def test_ticks_are_short() -> None:
    texts = [tick_text(value) for value in (0, 0.002, 1e-5, -2.5e-4, 12000, 1.5e6, -3)]
    assert texts == ["0", "0.002", "1e−5", "−2.5e−4", "12,000", "1.5 M", "−3"]


def test_unwritable_folders_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "a", lines=records(0, 0.0))
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "no" / "report")])
    assert "no such folder" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs" / "a" / "config.json").read_text())["name"] == "a"
