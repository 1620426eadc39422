"""The page in a real browser: no message, no request, figures and tables shown, sorted and hovered; at the size of a
phone; and without a fault that axe-core finds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import browser as browsers
from browser import Browser
from run_folders import records, write_predictions, write_run
from scalevit.cli.main import main
from scalevit.reports.run_page import refresh_run_page

pytestmark = pytest.mark.skipif(browsers.missing() is not None, reason=browsers.missing() or "")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    for seed in (0, 1, 2):
        for number, group in enumerate(("none", "grouped", "thin")):
            lines = records(seed + 10 * number, -0.6 * number, ema=group != "thin")
            write_run(folder / "runs" / f"{group}-{seed}", group, seed, lines=lines)
    write_run(folder / "runs" / "stopped", "thin", 3, lines=records(9, 0.0, epochs=4), finished=False)
    main(["report", str(folder / "runs"), "--output", str(folder / "report")])
    return folder / "report" / "report.html"


@pytest.fixture(scope="module")
def run_page(page: Path) -> Path:
    """Of one of the runs, with predictions."""
    folder = page.parents[1] / "runs" / "none-0"
    write_predictions(folder)
    return refresh_run_page(folder)


@pytest.fixture(scope="module")
def session() -> Iterator[Browser]:
    with browsers.headless_browser() as browser:
        yield browser


@pytest.fixture
def browser(session: Browser, page: Path) -> Browser:
    session.look(width=1280)
    session.open(page)
    return session


def test_nothing_is_requested_and_nothing_complained_about(browser: Browser, page: Path) -> None:
    browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
    assert browser.messages() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page.resolve().as_uri()]


def test_the_page_of_a_run_is_shown_without_a_request(browser: Browser, run_page: Path) -> None:
    browser.open(run_page)
    loaded = browser.run("return [...document.images].map(one => one.naturalWidth)")
    assert loaded == [4, 4], "the images are in the page"
    assert browser.run("return document.querySelectorAll('.cell.hit').length") == 9
    assert browser.messages() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [run_page.resolve().as_uri()]


def test_a_request_would_be_blocked_and_noticed(browser: Browser) -> None:
    """The page forbids it, whatever finds its way into it."""
    browser.run(
        "const image = new Image(); image.src = 'http://127.0.0.1:9/x.png';"
        "return new Promise(done => { image.onerror = done; image.onload = done; }).then(() => 0)"
    )
    (message,) = browser.messages()
    assert "Content Security Policy" in message


def test_figures_and_tables_are_shown(browser: Browser) -> None:
    sizes = browser.run(
        "return [...document.querySelectorAll('.chart, main > section > .scroll')]"
        ".map(one => one.getBoundingClientRect()).map(box => [box.width, box.height])"
    )
    assert len(sizes) == 12 + 6
    assert min(width for width, _ in sizes) > 300
    assert min(height for _, height in sizes) > 60
    lines = browser.run(
        "return [...document.querySelectorAll('#training-loss .line')].map(one => getComputedStyle(one).stroke)"
    )
    assert len(set(lines)) == 3, "a colour for each group, from the style sheet"


def test_tables_are_sorted_by_a_click(browser: Browser) -> None:
    column = (
        "const table = document.querySelector('#accuracy table'), at = arguments[0];"
        "if (at >= 0) table.tHead.rows[0].cells[at].querySelector('button').click();"
        "const shown = [...table.tBodies[0].rows].map(row => row.cells[3].textContent);"
        "return [table.querySelector('[aria-sort]')?.ariaSort, shown]"
    )
    _, before = browser.run(column, -1)
    assert before.count("–") == 1, "the EMA that a group does not keep"
    numbers = sorted((text for text in before if text != "–"), key=lambda text: float(text.split()[0]))
    assert browser.run(column, 3) == ["ascending", [*numbers, "–"]]
    assert browser.run(column, 3) == ["descending", [*reversed(numbers), "–"]]
    assert browser.run(column, 0)[0] == "ascending"


def test_a_point_shows_its_values(browser: Browser) -> None:
    shown = browser.run(
        "const tip = document.getElementById('tip'), before = tip.hidden;"
        "const point = document.querySelector('#top1-ema .hit');"
        "point.firstChild.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));"
        "return [before, tip.hidden, tip.textContent, tip.getBoundingClientRect().left]"
    )
    assert shown[:2] == [True, False]
    assert shown[2].startswith("none, epoch 1: ")
    assert shown[2].endswith("(3 seeds)")
    assert shown[3] > 0


def test_it_is_usable_on_a_phone(browser: Browser) -> None:
    browser.look(width=375)
    sizes = browser.run(
        "const page = document.scrollingElement, chart = document.querySelector('.chart');"
        "const scale = chart.getBoundingClientRect().width / chart.viewBox.baseVal.width;"
        "const text = parseFloat(getComputedStyle(chart.querySelector('text')).fontSize) * scale;"
        "const links = [...document.querySelectorAll('nav a')].map(one => one.getBoundingClientRect().height);"
        "return [page.scrollWidth, text, Math.min(...links)]"
    )
    assert sizes[0] == 375, "only tables scroll sideways"
    assert sizes[1] >= 10, "labels are at least 10 px high"
    assert sizes[2] >= 24, "WCAG 2.2, target size"


@pytest.mark.parametrize(
    ("which", "width", "dark"),
    [
        ("page", 1280, False),
        ("page", 1280, True),
        ("page", 375, False),
        ("run_page", 1280, True),
        ("run_page", 375, False),
    ],
)
def test_axe_finds_no_fault(which: str, width: int, dark: bool, session: Browser, request) -> None:
    script = browsers.axe_script()
    if not script.exists():
        pytest.skip("needs axe-core (npm install --no-save axe-core)")
    browser = session
    browser.look(width=width, dark=dark)
    browser.open(request.getfixturevalue(which))
    assert browser.run("return document.scrollingElement.scrollWidth") <= width, "only tables scroll sideways"
    browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
    browser.run(script.read_text())
    found = browser.run("return axe.run(document).then(result => result.violations)")
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found] == []
    browser.run("document.querySelector('main').append(document.createElement('img'))")  # without a text
    found = browser.run("return axe.run('main > img').then(result => result.violations.map(one => one.id))")
    assert "image-alt" in found, "it finds what is there"
