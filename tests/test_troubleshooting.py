"""Every message in docs/troubleshooting.md is printed by the code: each row has a case, and each case a row.

The cases are in tests/support/message_cases_*.py. `...` in a documented message stands for any text. A case ends with
the message as a `UserError`, or returns what it printed on standard error.
"""

import re
import shutil
from pathlib import Path

import pytest

import message_cases_data  # noqa: F401 (fills CASES)
import message_cases_runs  # noqa: F401
import message_cases_weights  # noqa: F401
from message_case import CASES, Case, Place
from scalevit.data.builtin import digits as digit_samples
from scalevit.data.writing.writer import write_samples
from scalevit.errors import UserError

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
SECTION = "Messages of scalevit"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for part, samples in digit_samples().items():
        few = [sample for sample in samples if sample[3] < 2][:24]
        write_samples(few, folder / part, shard_size=12, classes=[str(digit) for digit in range(10)])
    return folder


@pytest.fixture
def place(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shards, tmp_path / "shards")
    return Place(tmp_path, monkeypatch, capsys)


def produced(run: Case, place: Place) -> str:
    """The message of a case, as a user sees it after `error: `."""
    try:
        shown = run(place)
    except UserError as error:
        shown = str(error)
    except SystemExit:
        shown = place.capsys.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")
    assert shown is not None, "the case ended without a message"
    return shown


@pytest.mark.parametrize("message", CASES)
def test_the_message_is_printed(message: str, place: Place) -> None:
    shown = produced(CASES[message], place)
    assert "\n" not in shown
    pattern = ".*".join(map(re.escape, message.split("...")))
    assert re.fullmatch(pattern, shown), shown


def test_every_documented_message_has_a_case_and_every_case_a_row() -> None:
    (section,) = re.findall(rf"^## {SECTION}\n(.*?)^## ", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    cells = [line.removeprefix("| ").split(" | ")[0] for line in section.splitlines() if line.startswith("| ")]
    # Code that has backticks itself is enclosed by two.
    found = [re.fullmatch(r"(?:`` (.*) ``|`([^`]*)`)", cell) for cell in cells if cell != "Message"]
    assert all(found), "the first cell of a row is one message in backticks"
    messages = [match[1] or match[2] for match in found if match]
    assert sorted(messages) == sorted(CASES)
